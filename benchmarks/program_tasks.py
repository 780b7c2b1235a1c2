"""What worker.py runs of files that `mixer_jax export` wrote, each in the runtime that people deploy it in."""

from collections.abc import Callable
from functools import partial

import numpy as np
from worker import Job, Prepared, images_of

from mixer_jax.export import formats


def images_first(job: Job) -> np.ndarray:
    return np.ascontiguousarray(images_of(job).transpose(0, 3, 1, 2))


def onnxruntime(job: Job) -> Prepared:
    """In float32, or where the others are in bfloat16 in float16. Its threads stop spinning when a run has ended."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(job["programs"][".onnx"], options, providers=["CPUExecutionProvider"])
    call = partial(session.run, None, {"images": images_first(job)})
    return call, {"logits": call()[0]}, {"dtype": "float16" if job["dtype"] == "bfloat16" else job["dtype"]}


def openvino(job: Job) -> Prepared:
    """The float32 file, computed in the dtype of the job and no other."""
    import openvino as ov

    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[job["dtype"]],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job["threads"],
    }
    images = images_first(job)
    request = ov.Core().compile_model(job["programs"]["float32 .onnx"], "CPU", hints).create_infer_request()
    call = partial(request.infer, {0: images}, share_inputs=True)
    return call, {"logits": np.array(call()[0])}, {}


def opened(job: Job, ending: str) -> Prepared:
    """As `predict` runs it: by JAX or PyTorch."""
    call = partial(formats.opened(job["programs"][ending]).run, images_of(job))
    return call, {"logits": call()}, {}


TASKS: dict[str, dict[str, Callable[[Job], Prepared]]] = {
    "forward": {
        "onnxruntime_file": onnxruntime,
        "openvino_file": openvino,
        "stablehlo_file": partial(opened, ending=".stablehlo"),
        "pt2_file": partial(opened, ending=".pt2"),
    }
}
