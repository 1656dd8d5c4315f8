"""The same programs on other machines, and what has to be checked on them."""
