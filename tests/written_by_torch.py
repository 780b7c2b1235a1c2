"""Checkpoints as PyTorch's users write them. Every writer puts one into a folder and returns the path to read."""

import argparse
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conftest import TINY
from written_by_jax import AVERAGE, WEIGHTS

from convert import Checkpoint


def tensors(arrays: Mapping[str, np.ndarray] = WEIGHTS, layout: str = "timm", prefix: str = "") -> OrderedDict:
    return OrderedDict((prefix + name, tensor) for name, tensor in Checkpoint.from_arrays(arrays).to(layout).as_torch().items())


def torch_save(folder: Path, build: Callable[[], Any], **options) -> Path:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what torch.compile imports
        torch.save(build(), folder / "w.pth", **options)
    return folder / "w.pth"


def torch_model():
    from mixer_jax import torch_pretrained

    return torch_pretrained.load(Checkpoint.from_arrays(WEIGHTS).with_image_size(TINY.image_size))


def torch_optimizer() -> dict:
    import torch

    parameters = [torch.nn.Parameter(tensor) for tensor in tensors().values()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def timm_training(**more) -> dict:
    arguments = argparse.Namespace(model="mixer_b16_224", lr=0.1, mean=[0.5] * 3, crop_pct=None)
    facts = {
        "epoch": 3,
        "arch": "mixer_b16_224",
        "optimizer": torch_optimizer(),
        "version": 2,
        "args": arguments,
        "metric": 0.5,
    }
    return facts | {"state_dict": tensors()} | more


def averaged_twice() -> dict:
    return timm_training(state_dict_ema=tensors(AVERAGE), amp_scaler={"scale": 65536.0})


def lightning() -> dict:
    return {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": tensors(prefix="model."),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 2, "completed": 2}}}},
        "callbacks": {"ModelCheckpoint{'mode': 'min'}": {"best_model_path": "last.ckpt"}},
        "optimizer_states": [torch_optimizer()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "layers": [1, 2]},
    }


def mmengine() -> dict:
    return {
        "meta": {"epoch": 1, "cfg": "model = dict(type='ImageClassifier')", "dataset_meta": {"classes": ("a", "b")}},
        "state_dict": tensors(layout="mmpretrain"),
        "message_hub": {"log_scalars": {}, "runtime_info": {"iter": 10}},
        "optimizer": torch_optimizer(),
        "param_schedulers": [{"last_step": 1}],
    }


def compiled() -> dict:
    import torch

    return torch.compile(torch_model()).state_dict()


def data_parallel() -> dict:
    import torch

    return {"model": torch.nn.DataParallel(torch_model()).state_dict(), "epoch": 3}


def distributed_and_compiled() -> dict:
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.compile(torch_model()))
        return {"state_dict": wrapped.state_dict()}
    finally:
        torch.distributed.destroy_process_group()


def weight_averaging() -> dict:
    import torch

    return torch.optim.swa_utils.AveragedModel(torch_model()).state_dict()


def with_distributed_checkpoint(folder: Path) -> Path:
    import torch.distributed.checkpoint as distributed_checkpoint

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        distributed_checkpoint.save({"model": tensors()}, checkpoint_id=folder / "dcp")
    return folder / "dcp"


def scripted(folder: Path) -> Path:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), folder / "w.pt")
    return folder / "w.pt"


def safetensors_of_a_model(folder: Path) -> Path:
    from safetensors.torch import save_model

    save_model(torch_model(), folder / "model.safetensors")
    return folder / "model.safetensors"
