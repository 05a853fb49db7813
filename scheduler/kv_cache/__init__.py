"""The KV cache of one engine: blocks on the device, copies in host memory and on disk, and the moves between them."""
