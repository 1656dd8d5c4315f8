"""The local web page of `edgespeech demo`: what it hears in a clip (`listen`), and the server (`server`)."""
