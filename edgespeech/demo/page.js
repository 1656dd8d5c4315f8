// The page: takes a clip, sends it to the server, shows what comes back.

import { draw } from "./picture.js";

const at = (id) => document.getElementById(id);
const THRESHOLD_RULES = {
  entropy: "mean entropy, nats per frame: leaves at or below",
  posterior: "posterior of the best text: leaves at or above",
  max_probability: "mean of the largest probability: leaves at or above",
  similarity: "cosine of a block's input and output: leaves at or above",
  patience: "exits in a row that agree: leaves at or above",
  calibrated: "probability that no deeper exit is better: leaves at or above",
};

let model = { most_seconds: 30, most_bytes: 0 };
let clip = null; // what the server said of the newest one
let shown = null; // the text and the words that are on the page
let recorder = null;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function say(status, error = "") {
  at("status").textContent = status;
  at("error").textContent = error;
}

// ------------------------------------------------------------------------------------------ clips

/** Mono WAV, 16 bits. */
function wav(buffer) {
  const { length, numberOfChannels: channels, sampleRate: rate } = buffer;
  const view = new DataView(new ArrayBuffer(44 + 2 * length));
  const text = (place, letters) => [...letters].forEach((c, i) => view.setUint8(place + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * length, true);
  const data = Array.from({ length: channels }, (_, channel) => buffer.getChannelData(channel));
  for (let i = 0; i < length; i++) {
    const mean = data.reduce((sum, samples) => sum + samples[i], 0) / channels;
    view.setInt16(44 + 2 * i, Math.max(-32768, Math.min(32767, Math.round(32768 * mean))), true);
  }
  return new Blob([view], { type: "audio/wav" });
}

async function record() {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    say("", `The microphone cannot be used (${error.name}): allow it, or choose a file.`);
    return;
  }
  const pieces = [];
  const start = performance.now();
  const seconds = () => Math.min(model.most_seconds, (performance.now() - start) / 1000);
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = (event) => pieces.push(event.data);
  const clock = setInterval(() => {
    at("record").textContent = `Stop (${seconds().toFixed(1)} s)`;
    // Half a second less than the limit, for what the encoder adds.
    if (seconds() > model.most_seconds - 0.5) recorder?.stop();
  }, 100);
  recorder.onstop = async () => {
    clearInterval(clock);
    stream.getTracks().forEach((track) => track.stop());
    recorder = null;
    at("record").textContent = "Record";
    at("record").classList.remove("running");
    const context = new AudioContext();
    try {
      await hear(wav(await context.decodeAudioData(await new Blob(pieces).arrayBuffer())), "the recording");
    } catch (error) {
      say("", `The recording cannot be read (${error.message}): record for a little longer.`);
    } finally {
      context.close();
    }
  };
  recorder.start();
  say("Recording; Stop ends it.");
  at("record").classList.add("running");
}

async function hear(blob, name) {
  if (model.most_bytes && blob.size > model.most_bytes) {
    say("", `${name} has ${(blob.size / 2 ** 20).toFixed(1)} MiB, the limit is ${model.most_bytes / 2 ** 20} MiB: cut it.`);
    return;
  }
  const player = at("player");
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(blob);
  player.hidden = false;
  say(`Listening to ${name} …`);
  at("record").disabled = at("file").disabled = true;
  try {
    const answer = await fetch("transcribe", { method: "POST", body: blob });
    const facts = await answer.json();
    if (!answer.ok) {
      say("", facts.error);
      return;
    }
    clip = facts;
    show();
    say(`${name}: ${clip.seconds.toFixed(1)} s of audio, heard in ${(clip.milliseconds / 1000).toFixed(2)} s.`);
  } catch (error) {
    say("", `The server does not answer (${error.message}): start edgespeech demo again.`);
  } finally {
    at("record").disabled = !navigator.mediaDevices;
    at("file").disabled = false;
  }
}

// ----------------------------------------------------------------------------------------- results

function show() {
  at("result").hidden = false;
  at("exits").hidden = !clip.exits;
  if (clip.exits) {
    at("rule").textContent = `Threshold (${THRESHOLD_RULES[clip.exits.rule]})`;
    at("criterion").textContent = clip.exits.rule.replace("_", " ");
    at("threshold").value = +clip.exits.threshold.toPrecision(4);
    chooseExit(clip.exits.threshold);
  } else {
    showWords(clip.text, clip.words);
  }
  const layer = at("layer");
  const old = layer.value;
  layer.replaceChildren(...clip.layers.map((each, i) => element("option", each.name, { value: i })));
  if (clip.layers[old]) layer.value = old;
  at("choosers").hidden = clip.layers.length === 0;
  chooseLayer();
}

function chooseExit(threshold) {
  const { rule, rows, tuned } = clip.exits;
  const passes = rows.map(({ score }) => (rule === "entropy" ? score <= threshold : score >= threshold));
  const taken = passes.includes(true) ? passes.indexOf(true) : rows.length - 1;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  at("taken").textContent =
    `Exit ${taken + 1} of ${rows.length} is taken: ${percent(rows[taken].share)} of the whole compute. ` +
    (tuned ? "The threshold was tuned and saved with the model." : "The model has no tuned threshold (exit_policy.json); this one is a guess.");
  at("rows").replaceChildren(
    ...rows.map(({ score, share, text }, i) => {
      const row = element("tr", "", i === taken ? { "aria-current": "true" } : { class: i > taken ? "beyond" : "" });
      row.append(
        element("th", `${i + 1}`, { scope: "row" }),
        element("td", `${+score.toPrecision(4)}`),
        element("td", percent(share)),
        element("td", text || "(nothing)"),
      );
      return row;
    }),
  );
  showWords(rows[taken].text, rows[taken].words);
}

function showWords(text, words) {
  shown = { text, words };
  at("text").textContent = text || "(nothing was heard)";
  at("words").replaceChildren(
    ...words.map(({ word, start, end }) => {
      const button = element("button", word, { type: "button", title: `${start} s to ${end} s` });
      button.append(" ", element("small", `${start.toFixed(2)} s`));
      button.addEventListener("click", () => {
        at("player").currentTime = start;
        at("player").play();
      });
      const item = element("li", "");
      item.append(button);
      return item;
    }),
  );
}

function chooseLayer() {
  const layer = clip.layers[at("layer").value];
  const heads = layer ? layer.heads : 0;
  const old = +at("head").value || 0;
  at("head").replaceChildren(
    ...Array.from({ length: heads }, (_, i) => element("option", `${i + 1} of ${heads}`, { value: i })),
  );
  at("head").value = Math.min(old, Math.max(0, heads - 1));
  at("legend").textContent = !layer
    ? "No layer of this model has pulses: the spectrogram alone."
    : layer.heads
      ? "Each row is a pulse; colour is where it is open. Open pulses average the frames inside them."
      : "This layer has its local path alone and no pulses.";
  redraw();
}

function redraw() {
  if (!clip) return;
  const layer = clip.layers[at("layer").value];
  const head = +at("head").value || 0;
  const kinds = layer?.kinds.map(({ kind, pulses }) => `${pulses} ${kind}`).join(", ");
  at("picture").setAttribute(
    "aria-label",
    `Spectrogram of ${clip.seconds.toFixed(1)} seconds` +
      (kinds ? `; below it when the pulses of layer ${layer.name}, head ${head + 1} are open: ${kinds}` : "") +
      (shown.text ? `; said: ${shown.text}` : ""),
  );
  draw(at("picture"), clip, shown.words, layer, head);
}

// ------------------------------------------------------------------------------------------- start

at("record").addEventListener("click", () => (recorder ? recorder.stop() : record()));
at("file").addEventListener("change", ({ target }) => {
  if (target.files.length) hear(target.files[0], target.files[0].name);
  target.value = ""; // the same file can be chosen again
});
at("layer").addEventListener("change", chooseLayer);
at("head").addEventListener("change", redraw);
at("threshold").addEventListener("input", ({ target }) => {
  if (!clip?.exits || !Number.isFinite(target.valueAsNumber)) return;
  chooseExit(target.valueAsNumber);
  redraw();
});
window.addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

if (!navigator.mediaDevices) {
  at("record").disabled = true; // browsers lend the microphone to https and to this machine's own pages alone
  at("record").title = "Recording needs the page at 127.0.0.1 or behind https";
}
model = await (await fetch("model")).json();
at("model").textContent =
  `${model.name}: ${model.kind}, ${model.parameters.toLocaleString("en")} parameters, ${model.layers} layers` +
  (model.pulse_layers ? `, ${model.pulse_layers} with pulses` : "") +
  (model.exits ? `, ${model.exits} exits` : "");
at("limits").textContent = `WAV, FLAC, Ogg or MP3, at most ${model.most_seconds} s and ${model.most_bytes / 2 ** 20} MiB. Nothing leaves this server.`;
