"""FORMS, the table of checkpoints that ordinary scripts write: each is read, and equal, or refused with a message."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx, serialization
from flax.traverse_util import flatten_dict
from other_networks import NETWORKS, zeros
from written_by_jax import (
    AVERAGE,
    AVERAGE_PARAMS,
    FRESH,
    FRESH_PARAMS,
    ORBAX_TREES,
    PARAMS,
    TREES,
    WEIGHTS,
    big_vision,
    big_vision_run,
    big_vision_tree,
    cast,
    composite,
    managed,
    managed_by_loss,
    manager,
    model,
    msgpack_serialize,
    optimiser_arrays,
    optimizer_of,
    pickled,
    pytree,
    pytree_checkpointer,
    run_of,
    safetensors,
    safetensors_of_flax,
    save_checkpoint,
    save_old_checkpoint,
    saved_as_object,
    savez,
    standard,
    to_bytes,
    to_bytes_in_chunks,
    train_state,
    under,
    unfinished_beside,
    v1_checkpointables,
    v1_save,
    v1_save_pytree,
    v1_training,
    with_average,
)
from written_by_torch import (
    averaged_twice,
    compiled,
    data_parallel,
    distributed_and_compiled,
    lightning,
    mmengine,
    safetensors_of_a_model,
    scripted,
    tensors,
    timm_training,
    torch_model,
    torch_optimizer,
    torch_save,
    weight_averaging,
    with_distributed_checkpoint,
)

from convert import Checkpoint, ReadOptions

SEVERAL = "several sets of weights"


@dataclass(frozen=True)
class Form:
    """`write` puts a checkpoint into an empty folder and returns the path to read, under `options`.

    Either the weights are `weights`, in `dtype`, and what is listed as also in the file is `beside` (the last part of each
    path; None: not compared), or the message of the refusal matches `refused`.
    """

    write: Callable[[Path], Path]
    refused: str = ""
    options: ReadOptions = ReadOptions()
    weights: Mapping[str, np.ndarray] | None = None
    dtype: str = "float32"
    beside: frozenset[str] | None = frozenset()
    torch: bool = False

    @property
    def expected(self) -> Checkpoint:
        return Checkpoint.from_arrays(WEIGHTS if self.weights is None else self.weights).astype(self.dtype)


# The table


def forms_of_trees() -> dict[str, Form]:
    """Every tree as msgpack and as Orbax, and two trees by every writer."""
    forms = {}
    for name, (build, beside) in TREES.items():
        for writer in (to_bytes, standard):
            forms[f"{writer.__name__}: {name}"] = Form(lambda folder, w=writer, b=build: w(folder, b()), beside=beside)
    for name, (build, beside) in ORBAX_TREES.items():
        forms[f"standard: {name}"] = Form(lambda folder, b=build: standard(folder, b()), beside=beside)
    writers = {
        "msgpack_serialize": msgpack_serialize,
        "save_checkpoint, msgpack": save_old_checkpoint,
        "save_checkpoint, Orbax": save_checkpoint,
        "PyTreeCheckpointer": pytree_checkpointer,
        "PyTree without OCDBT": partial(pytree, use_ocdbt=False),
        "PyTree in zarr3": partial(pytree, use_zarr3=True),
        "PyTree in zarr3 without OCDBT": partial(pytree, use_ocdbt=False, use_zarr3=True),
        "CheckpointManager": managed,
        "v1 save": v1_save,
        "v1 save_pytree": v1_save_pytree,
        "v1 Checkpointer": v1_training,
    }
    for writer, write in writers.items():
        for name in ("params", "TrainState, adam"):
            build, beside = TREES[name]
            forms[f"{writer}: {name}"] = Form(lambda folder, w=write, b=build: w(folder, b()), beside=beside)
    return forms


def forms_of_runs() -> dict[str, Form]:
    """Several steps, several items, and what lies beside them."""
    standard_save, json_save = ocp.args.StandardSave, ocp.args.JsonSave
    params, average = standard_save({"params": PARAMS}), standard_save({"params": AVERAGE_PARAMS})
    optimiser = standard_save({"mu": PARAMS, "count": np.int32(3)})
    described = ocp.args.Composite(state=params, meta=json_save({"epoch": 3}))
    steps = {3: average}
    return {
        "msgpack run": Form(run_of(save_old_checkpoint)),
        "msgpack run, another prefix": Form(run_of(save_old_checkpoint, "mixer_")),
        "msgpack run, an earlier step": Form(run_of(save_old_checkpoint), options=ReadOptions(step=2), weights=AVERAGE),
        "flax Orbax run": Form(run_of(save_checkpoint)),
        "flax Orbax run, an earlier step": Form(run_of(save_checkpoint), options=ReadOptions(step=2), weights=AVERAGE),
        "flax Orbax run, no such step": Form(run_of(save_checkpoint), "step 5.*2, 10", ReadOptions(step=5)),
        "overwritten checkpoint": Form(
            lambda folder: [save_checkpoint(folder, {"params": p}, 3, overwrite=True) for p in (AVERAGE_PARAMS, PARAMS)][-1]
        ),
        "manager, newest step": Form(partial(manager, args=params, steps=steps)),
        "manager, an earlier step": Form(
            partial(manager, args=params, steps=steps), options=ReadOptions(step=3), weights=AVERAGE
        ),
        "manager, no such step": Form(partial(manager, args=params, steps=steps), "step 5.*3, 12", ReadOptions(step=5)),
        "manager, one step": Form(lambda folder: manager(folder, params, steps) / "12"),
        "manager, one item": Form(lambda folder: manager(folder, params, steps) / "12" / "default"),
        "manager, step prefix and zeros": Form(
            partial(manager, args=params, steps=steps, step_prefix="mixer", step_format_fixed_length=8)
        ),
        "manager, an unfinished step": Form(unfinished_beside),
        "manager, items state and meta": Form(partial(manager, args=described), beside=frozenset({"meta"})),
        "manager, items params and opt_state": Form(
            partial(manager, args=ocp.args.Composite(params=standard_save(PARAMS), opt_state=optimiser)),
            beside=frozenset({"opt_state"}),
        ),
        "manager, metrics": Form(managed_by_loss, beside=frozenset({"metrics"})),
        "manager, PyTreeSave": Form(partial(manager, args=ocp.args.PyTreeSave({"params": PARAMS}))),
        "composite, model and config": Form(
            partial(composite, model=params, config=json_save({"lr": 0.1})), beside=frozenset({"config"})
        ),
        "composite, bare params under any name": Form(partial(composite, anything=standard_save(PARAMS))),
        "composite, weights and average": Form(
            partial(composite, params=standard_save(PARAMS), ema=standard_save(AVERAGE_PARAMS)), f"{SEVERAL}, ema, params"
        ),
        "composite, average by key": Form(
            partial(composite, params=standard_save(PARAMS), ema=standard_save(AVERAGE_PARAMS)),
            options=ReadOptions(key="ema"),
            weights=AVERAGE,
            beside=frozenset({"params"}),
        ),
        "PyTree with strings and scalars": Form(
            lambda folder: pytree(folder, {"params": PARAMS, "name": "mixer", "none": None, "step": 3, "rate": 0.1}),
            beside=frozenset({"name", "none", "step", "rate"}),
        ),
        "v1 checkpointables": Form(
            partial(v1_checkpointables, model={"params": PARAMS}, meta={"epoch": 3}), beside=frozenset({"meta"})
        ),
        "v1 item": Form(lambda folder: v1_save(folder, {"params": PARAMS}) / "state"),
        "v1 earlier step": Form(
            lambda folder: v1_training(folder, {"params": PARAMS}), options=ReadOptions(step=3), weights=AVERAGE
        ),
        "v1 PyTree without OCDBT": Form(lambda folder: v1_save(folder, {"params": PARAMS}, use_ocdbt=False)),
        "v1 nnx.state": Form(lambda folder: v1_save(folder, nnx.state(model()))),
        "orbax without weights": Form(lambda folder: standard(folder, {"x": np.ones(3)}), "not a Mixer checkpoint"),
        "nnx optimizer alone": Form(
            lambda folder: standard(folder, nnx.state(optimizer_of(model()))), "only an optimiser's arrays"
        ),
        "big_vision": Form(lambda folder: big_vision(folder, big_vision_tree()), beside=frozenset({"opt"})),
        "big_vision run": Form(big_vision_run, beside=frozenset({"opt"})),
        "big_vision LAST": Form(lambda folder: big_vision_run(folder) / "checkpoint.bv-LAST", beside=frozenset({"opt"})),
        "big_vision run, an earlier step": Form(big_vision_run, options=ReadOptions(step=20), weights=AVERAGE),
    }


def forms_of_sets_and_dtypes() -> dict[str, Form]:
    forms = {}
    for writer in (to_bytes, standard):
        write = lambda folder, w=writer: w(folder, with_average())  # noqa: E731
        name = writer.__name__
        forms[f"{name}: TrainState with an average"] = Form(write, f"{SEVERAL}, ema_params, params: say which with --key")
        forms[f"{name}: params of a TrainState with an average"] = Form(write, options=ReadOptions(key="params"), beside=None)
        forms[f"{name}: its average"] = Form(write, options=ReadOptions(key="ema_params"), weights=AVERAGE, beside=None)
        forms[f"{name}: no such set"] = Form(write, "no weights under the key 'ema': found ema_params", ReadOptions(key="ema"))
        forms[f"{name}: two sets"] = Form(
            lambda folder, w=writer: w(folder, {"student": PARAMS, "teacher": AVERAGE_PARAMS}), f"{SEVERAL}, student, teacher"
        )
        forms[f"{name}: optimiser alone"] = Form(
            lambda folder, w=writer: w(
                folder, {"opt_state": serialization.to_state_dict(train_state(optax.adam(1)).opt_state)}
            ),
            "only an optimiser's arrays",
        )
        for dtype in ("bfloat16", "float16"):
            forms[f"{name}: {dtype}"] = Form(lambda folder, w=writer, d=dtype: w(folder, cast(d)), dtype=dtype)
        double = lambda folder, w=writer: w(folder, cast("float64"))  # noqa: E731
        forms[f"{name}: float64"] = Form(double, "float64 weights.*--dtype float64")
        forms[f"{name}: float64 kept"] = Form(double, options=ReadOptions(dtype="float64"), dtype="float64")
    return forms


def forms_of_fresh_heads() -> dict[str, Form]:
    """Zeros, which some writers of zarr leave out."""
    writers = {
        "to_bytes": to_bytes,
        "to_bytes in chunks": to_bytes_in_chunks,
        "standard": standard,
        "PyTree without OCDBT": partial(pytree, use_ocdbt=False),
        "v1 save": v1_save,
        "big_vision": big_vision,
    }
    return {
        f"{name}: a head of zeros": Form(partial(write, tree={"params": FRESH_PARAMS}), weights=FRESH)
        for name, write in writers.items()
    }


def forms_of_numpy() -> dict[str, Form]:
    slashed = flatten_dict({"params": PARAMS}, sep="/")
    momentum = optimiser_arrays("opt/0/trace", "momentum")
    linen = optimiser_arrays("opt/state/param_states", "momentum") | {"opt/state/step": np.array(3)}
    return {
        "npz: params/": Form(partial(savez, arrays=slashed)),
        "npz: dotted": Form(partial(savez, arrays=flatten_dict({"params": PARAMS}, sep="."))),
        "npz: tuples as text": Form(partial(savez, arrays={str(path): array for path, array in flatten_dict(PARAMS).items()})),
        "npz: params/ and opt/": Form(partial(savez, arrays=slashed | momentum), beside=frozenset({"opt"})),
        "npz: opt/target/ and opt/state/": Form(
            partial(savez, arrays=under("opt/target/", WEIGHTS) | linen), beside=frozenset({"state"})
        ),
        "npz: compressed": Form(lambda folder: np.savez_compressed(folder / "w.npz", **slashed) or folder / "w.npz"),
        "npz: names joined by __": Form(
            partial(savez, arrays=flatten_dict(PARAMS, sep="__")), "not a Mixer checkpoint: no array of a Mixer block"
        ),
        "npz: a dictionary in an object array": Form(
            partial(savez, arrays={"params": PARAMS}), "an object array: loading it would run code"
        ),
        "npy: a dictionary in an object array": Form(saved_as_object, "not a checkpoint|pickle"),
        "pickle: params": Form(partial(pickled, tree=PARAMS), "a bare pickle, which is never loaded"),
        "pickle: TrainState": Form(lambda folder: pickled(folder, (PARAMS, {}, 3)), "a bare pickle, which is never loaded"),
        "json": Form(
            lambda folder: (folder / "w.json").write_text(json.dumps({"params": {}})) and folder / "w.json", "not a checkpoint"
        ),
        "safetensors: dotted, by flax": Form(safetensors_of_flax),
        "safetensors: params/": Form(partial(safetensors, arrays=slashed)),
        "safetensors: timm_model.": Form(
            lambda folder: safetensors(folder, under("timm_model.", Checkpoint.from_arrays(WEIGHTS).to("timm").as_numpy()))
        ),
        **{f"other network: {name}": Form(partial(zeros, shapes=shapes), text) for name, (text, shapes) in NETWORKS.items()},
    }


def forms_of_torch() -> dict[str, Form]:
    timm, average = frozenset(["epoch", "arch", "optimizer", "version", "args", "metric"]), ReadOptions(key="state_dict_ema")
    hooks = frozenset(["epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks", "optimizer_states"])
    hooks |= {"lr_schedulers", "hparams_name", "hyper_parameters"}
    built = {
        "state_dict": (tensors, frozenset()),
        "state_dict in float16": (lambda: {name: tensor.half() for name, tensor in tensors().items()}, frozenset()),
        "{'state_dict': ...}": (lambda: {"state_dict": tensors(), "epoch": 3}, frozenset({"epoch"})),
        "{'model': ...}": (lambda: {"model": tensors(), "optimizer": torch_optimizer()}, frozenset({"optimizer"})),
        "{'net': {'weights': ...}}": (lambda: {"net": {"weights": tensors()}}, frozenset()),
        "parameters": (lambda: dict(torch_model().named_parameters()), frozenset()),
        "module.": (lambda: tensors(prefix="module."), frozenset()),
        "DataParallel": (data_parallel, frozenset({"epoch"})),
        "torch.compile": (compiled, frozenset()),
        "torch.compile and DistributedDataParallel": (distributed_and_compiled, frozenset()),
        "_orig_mod.module.": (lambda: tensors(prefix="_orig_mod.module."), frozenset()),
        "AveragedModel": (weight_averaging, frozenset({"n_averaged"})),
        "Lightning": (lightning, hooks),
        "timm's train.py": (timm_training, timm),
        "mmengine": (mmengine, frozenset({"meta", "message_hub", "optimizer", "param_schedulers"})),
        "backbone.": (lambda: {"state_dict": tensors(layout="mmpretrain")}, frozenset()),
        "MLX's names": (lambda: tensors(layout="mlx"), frozenset()),
        "tuple keys": (lambda: {tuple(name.split(".")): tensor for name, tensor in tensors().items()}, frozenset()),
    }
    forms = {
        f"torch: {name}": Form(
            lambda folder, b=build: torch_save(folder, b), dtype="float16" if "float16" in name else "float32", beside=beside
        )
        for name, (build, beside) in built.items()
    }
    averaged = partial(torch_save, build=averaged_twice)
    forms |= {
        "torch: state_dict_ema": Form(averaged, f"{SEVERAL}, state_dict, state_dict_ema: say which with --key or key="),
        "torch: state_dict_ema by key": Form(
            averaged, options=average, weights=AVERAGE, beside=timm | {"state_dict", "amp_scaler"}
        ),
        "torch: state_dict by key": Form(
            averaged, options=ReadOptions(key="state_dict"), beside=timm | {"state_dict_ema", "amp_scaler"}
        ),
        "torch: a whole module": Form(partial(torch_save, build=torch_model), r"torch.load\(weights_only=True\) refuses it"),
        "torch: before 1.6": Form(
            lambda folder: torch_save(folder, tensors, _use_new_zipfile_serialization=False), "a bare pickle, .*torch.save"
        ),
        "torch: a list of states": Form(
            partial(torch_save, build=lambda: [tensors(), torch_optimizer()]), "holds a list, not a state_dict"
        ),
        "torch: TorchScript": Form(scripted, r"torch.load\(weights_only=True\) refuses it"),
        "torch: distributed.checkpoint": Form(with_distributed_checkpoint, "a folder"),
        "safetensors: save_model": Form(safetensors_of_a_model),
    }
    return {name: Form(**vars(form) | {"torch": True}) for name, form in forms.items()}


FORMS = forms_of_trees() | forms_of_runs() | forms_of_sets_and_dtypes() | forms_of_fresh_heads()
FORMS |= forms_of_numpy() | forms_of_torch()
