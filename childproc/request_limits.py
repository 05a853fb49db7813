"""What a gateway refuses in a request, and a scheduler in a Submit."""

MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_BYTES = 256
MAX_GRAMMAR_BYTES = 1 << 18  # it travels to the workers each time that a seq takes a slot
# The scheduler compares every character of the output with every stop string, between rounds.
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_BIAS = 100  # as in OpenAI's API: enough to force or to exclude a token
ATTENTION_MODES = ("full", "budgeted")
