"""The cost of visual tokens: FLOPs, KV-cache size, dimensions of backbones, and the speed of this machine."""
