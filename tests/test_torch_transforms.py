"""The PyTorch model is an ordinary module: exported at one batch size it runs at others, hooks see the whole batch."""

import copy

import numpy as np
import pytest
from conftest import TINY, random_images, random_weights
from sides import twin_model

pytestmark = pytest.mark.torch
OTHERS = (1, 2, 7, 40)


@pytest.fixture(scope="module")
def model():
    import torch

    return twin_model(random_weights(TINY), TINY, param_dtype=torch.float32)


def images(count):
    import torch

    return torch.from_numpy(random_images(TINY, count)).permute(0, 3, 1, 2).contiguous()


def logits(model, count):
    import torch

    with torch.no_grad():
        return model(images(count)).numpy()


def runs_at_every_batch_size(run, model):
    for count in OTHERS:
        found, wanted = run(images(count)), logits(model, count)
        assert found.shape == (count, TINY.num_classes)
        assert np.abs(np.asarray(found) - wanted).max() <= 2e-6 * np.abs(wanted).max()  # measured: 3e-7


def test_torch_export_at_one_batch_size_runs_at_others(model):
    import torch

    with torch.no_grad():
        program = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        runs_at_every_batch_size(program.module(), model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_at_one_batch_size_runs_at_others(model):
    import torch

    with torch.no_grad():
        runs_at_every_batch_size(torch.jit.trace(model, images(32)), model)


@pytest.mark.filterwarnings("ignore")  # those of the exporter
def test_an_onnx_file_exported_at_one_batch_size_runs_at_others(model):
    import onnxruntime
    import torch

    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(model, (images(32),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (first,) = session.get_inputs()
    runs_at_every_batch_size(lambda x: session.run(None, {first.name: x.numpy()})[0], model)


def test_compiling_for_any_batch_size_compiles_once(model):
    import torch
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, dynamic=True, backend=counter)
    with torch.no_grad():
        for count in (2, 7, 33, 5):
            assert np.array_equal(compiled(images(count)).numpy(), logits(model, count))
    assert counter.frame_count == 1


def test_a_hook_sees_the_whole_batch_with_and_without_gradients(model):
    import torch

    model, seen = copy.deepcopy(model), []
    model.stem.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    model(images(40))
    with torch.inference_mode():
        model(images(40))
    assert seen == [40, 40]


def test_microbatches_give_what_the_whole_batch_gives(monkeypatch, model):
    import torch

    from mixer_jax import images as images_module
    from mixer_jax.torch_model import in_microbatches

    monkeypatch.setattr(images_module, "CACHE", 2 * 4 * TINY.num_tokens * TINY.channels_mlp_dim)
    model, seen = copy.deepcopy(model), []
    model.stem.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.inference_mode():
        found, wanted = in_microbatches(model, images(5), TINY).numpy(), model(images(5)).numpy()
    assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()
    assert seen == [2, 2, 1, 5]
