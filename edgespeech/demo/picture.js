// The spectrogram of a clip, and below it which pulses of one head are open when.

const SPECTROGRAM = 200; // heights and gaps in CSS pixels
const ROW = 11; // of one pulse
const TITLE = 22; // above each kind of pulse
const AXIS = 26;
// The palette of Okabe and Ito, which colour-blind readers can tell apart.
const COLOURS = { aperiodic: "#0072b2", runs: "#d55e00", periodic: "#009e73", positional: "#e69f00", mean: "#8a8f94" };
// From quiet to loud; brightness alone orders them, too.
const SHADES = [[6, 6, 14], [59, 15, 112], [140, 41, 129], [222, 73, 104], [254, 159, 109], [252, 253, 191]];

export function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

export function isOpen(bits, index) {
  return ((bits[index >> 3] >> (7 - (index & 7))) & 1) === 1;
}

function shade(value) {
  const place = (value / 255) * (SHADES.length - 1);
  const low = Math.min(Math.floor(place), SHADES.length - 2);
  return SHADES[low].map((from, i) => from + (place - low) * (SHADES[low + 1][i] - from));
}

function spectrogramImage({ frames, bins, shades }) {
  const values = bytes(shades);
  const image = new ImageData(frames, bins);
  const colours = Array.from({ length: 256 }, (_, value) => shade(value));
  for (let frame = 0; frame < frames; frame++) {
    for (let bin = 0; bin < bins; bin++) {
      const at = 4 * ((bins - 1 - bin) * frames + frame);
      image.data.set(colours[values[frame * bins + bin]], at);
      image.data[at + 3] = 255;
    }
  }
  const canvas = document.createElement("canvas");
  canvas.width = frames;
  canvas.height = bins;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function drawWords(context, words, x, seconds) {
  let free = 0;
  context.textBaseline = "top";
  for (const { word, start, end } of words) {
    context.fillStyle = "#ffffffb0";
    context.fillRect(x(start), 0, 1, SPECTROGRAM);
    const width = context.measureText(word).width + 6;
    const left = Math.max(0, Math.min((x(start) + x(end) - width) / 2, x(seconds) - width));
    if (left < free || width > x(seconds)) continue; // no room: the list of words has it
    context.fillStyle = "#000000a0";
    context.fillRect(left, 4, width, 17);
    context.fillStyle = "#fff";
    context.fillText(word, left + 3, 6);
    free = left + width + 2;
  }
}

function drawAxis(context, seconds, x, y, ink) {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10].find((s) => x(s) > 42) ?? 10;
  context.fillStyle = ink;
  context.textBaseline = "top";
  for (let i = 0; i * step <= seconds; i++) {
    const label = i === 0 ? "0 s" : `${+(i * step).toFixed(1)}`;
    const width = context.measureText(label).width;
    context.fillRect(x(i * step), y, 1, 5);
    context.fillText(label, Math.min(Math.max(0, x(i * step) - width / 2), x(seconds) - width), y + 8);
  }
}

/** Draws a clip; `layer` may be undefined. `head` counts from 0. */
export function draw(canvas, clip, words, layer, head) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const kinds = layer ? layer.kinds : [];
  const height = SPECTROGRAM + kinds.reduce((sum, kind) => sum + TITLE + ROW * kind.pulses, 0) + AXIS;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const style = getComputedStyle(canvas);
  const ink = style.color;
  const line = style.getPropertyValue("--line");
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "13px system-ui, sans-serif";
  const x = (second) => (second / clip.seconds) * width;

  const { frames, frame_seconds: step } = clip.spectrogram;
  context.imageSmoothingEnabled = frames > width * ratio;
  context.drawImage(spectrogramImage(clip.spectrogram), 0, 0, Math.min(width, x(frames * step)), SPECTROGRAM);
  drawWords(context, words, x, clip.seconds);

  let y = SPECTROGRAM;
  for (const { kind, pulses, bits } of kinds) {
    context.fillStyle = ink;
    context.textBaseline = "middle";
    context.fillText(`${kind} (${pulses})`, 0, y + TITLE / 2 + 1);
    y += TITLE;
    const open = bytes(bits);
    for (let pulse = 0; pulse < pulses; pulse++) {
      context.fillStyle = line;
      context.fillRect(0, y + ROW - 2, width, 1);
      context.fillStyle = COLOURS[kind] ?? ink;
      const row = (head * pulses + pulse) * layer.frames;
      for (let i = 0; i < layer.frames; i++) {
        if (!isOpen(open, row + i)) continue;
        let end = i + 1;
        while (end < layer.frames && isOpen(open, row + end)) end++;
        const left = x(i * layer.frame_seconds);
        context.fillRect(left, y, Math.max(1, x(end * layer.frame_seconds) - left), ROW - 3);
        i = end;
      }
      y += ROW;
    }
  }
  drawAxis(context, clip.seconds, x, y + 2, ink);
}
