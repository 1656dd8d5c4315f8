"""The subcommands of `edgespeech`, one a file.

Each has `add_arguments(parser)` and `run(arguments) -> exit status`, and imports what is slow to import inside `run`.
"""
