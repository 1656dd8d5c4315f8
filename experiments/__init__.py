"""One program per result; each says in its header the command, the hardware, the time and what to expect."""
