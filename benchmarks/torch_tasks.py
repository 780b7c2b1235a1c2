"""What worker.py runs from PyTorch: our PyTorch model, timm, the reference formulation, and runtimes that import the latter."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_reference import MlpMixer as Reference
from worker import MOMENTUM, RATE, Job, Prepared, images_of, labels_of

from convert import Checkpoint, read


def images_first(job: Job) -> torch.Tensor:
    """Images with channels first, contiguous."""
    return torch.from_numpy(np.ascontiguousarray(images_of(job).transpose(0, 3, 1, 2)))


def forward(job: Job, model: Any) -> Prepared:
    images = images_first(job).to(getattr(torch, job["dtype"]))

    def call() -> Any:
        with torch.inference_mode():
            return model(images)

    return call, {"logits": call().float().numpy()}, {}


def torch_model(job: Job) -> Prepared:
    """Our PyTorch model, eager, in the microbatches that the library offers."""
    from mixer_jax import torch_model, torch_pretrained

    dtype = getattr(torch, job["dtype"])
    model = torch_pretrained.load(job["weights"], dtype=dtype, param_dtype=dtype)
    return forward(job, lambda images: torch_model.in_microbatches(model, images, model.config))


def timm_model(job: Job) -> Any:
    """timm's MlpMixer with the GELU of the weights."""
    from timm.models.mlp_mixer import MlpMixer

    checkpoint = read(job["weights"])
    config = checkpoint.config
    model = MlpMixer(
        num_classes=config.num_classes,
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_blocks=config.num_blocks,
        embed_dim=config.hidden_dim,
        mlp_ratio=(config.tokens_mlp_dim / config.hidden_dim, config.channels_mlp_dim / config.hidden_dim),
        norm_layer=partial(torch.nn.LayerNorm, eps=config.layer_norm_epsilon),
        act_layer=partial(torch.nn.GELU, approximate="tanh" if config.gelu == "tanh" else "none"),
    )
    return with_weights(model, checkpoint.to("timm"), job)


def reference_model(job: Job) -> Any:
    checkpoint = read(job["weights"])
    return with_weights(Reference(checkpoint.config), checkpoint.to("reference"), job)


def with_weights(model: Any, checkpoint: Checkpoint, job: Job) -> Any:
    model.load_state_dict(checkpoint.as_torch())
    return model.to(getattr(torch, job["dtype"])).eval()


def timm_training(job: Job) -> Prepared:
    model = timm_model(job).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    images, labels = images_first(job), torch.from_numpy(labels_of(job)).long()

    def call() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return float(loss)

    return call, {"losses": np.asarray([call() for _ in range(3)])}, {}


def onnxruntime(job: Job) -> Prepared:
    """ONNX Runtime, exported by torch.onnx; its threads stop spinning when a run has ended."""
    import onnxruntime as ort

    path, images = str(Path(job["folder"]) / f"b{job['batch']}.onnx"), images_first(job)
    with contextlib.redirect_stdout(sys.stderr):
        torch.onnx.export(reference_model(job), (images,), path, input_names=["images"], dynamo=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    call = partial(session.run, None, {"images": images.numpy()})
    return call, {"logits": call()[0]}, {}


def openvino(job: Job) -> Prepared:
    """OpenVINO, converted from PyTorch, in the dtype of the job and no other."""
    import openvino as ov

    images = images_first(job)
    model = ov.convert_model(reference_model(job | {"dtype": "float32"}), example_input=images, input=[images.shape])
    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[job["dtype"]],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job["threads"],
    }
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    call = partial(request.infer, {0: images.numpy()}, share_inputs=True)
    return call, {"logits": np.array(call()[0])}, {}


TASKS: dict[str, dict[str, Callable[[Job], Prepared]]] = {
    "calling": {"torch_model": torch_model},
    "forward": {
        "torch_model": torch_model,
        "timm": lambda job: forward(job, timm_model(job)),
        "torch_eager": lambda job: forward(job, reference_model(job)),
        "torch_compile": lambda job: forward(job, torch.compile(reference_model(job))),
        "onnxruntime": onnxruntime,
        "openvino": openvino,
    },
    "training": {"timm": timm_training},
}
