"""Open a local web page that transcribes clips and draws the pulses and exits of a model."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--model",
        required=True,
        help="folder of a saved model with a CTC head, or a wav2vec2 of Hugging Face",
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any free one (default: 7860)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, which only this machine can reach)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C."""
    from edgespeech.demo.server import DemoServer

    # First of all: a port that is in use is known before a model is loaded.
    with DemoServer(arguments.host, arguments.port) as server:
        from edgespeech.demo.listen import Listener, exit_policy
        from edgespeech.interop.ctc_model import open_ctc_model

        model, tokenizer, _ = open_ctc_model(arguments.model)
        listener = Listener(model, tokenizer, exit_policy(model, arguments.model))
        server.listen = listener
        server.about = {"name": Path(arguments.model).name, **listener.about()}
        print(f"http://{arguments.host}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped")
    return 0
