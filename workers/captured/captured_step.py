"""A step that runs again and again on the same tensors: on CUDA one launch of a graph, elsewhere a call."""

from collections.abc import Callable

import torch

Step = Callable[[], None]
Capture = Callable[[Step], Step]

_NUM_WARM_UPS = 2  # the first compiles kernels and lets libraries choose theirs; the second takes no more memory


def capture_on(device: torch.device) -> Capture:
    """How steps are captured on this device.

    A step reads and writes tensors that outlive it, and nothing else but what it makes itself. It never reads the
    device on the host, and its shapes, launches and arguments do not depend on the values in tensors. So it can be
    repeated with other values. The result of a capture does that, without waiting for the device. On other devices than
    CUDA, a step is its own repetition. All steps captured by one result share the memory of what they make, so they may
    not run side by side.
    """
    if device.type != "cuda":
        return lambda step: step
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(step: Step) -> Step:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread is watched: NCCL's and the tiers' threads call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
        replay: Step = graph.replay
        return replay

    return capture
