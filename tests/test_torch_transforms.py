"""The PyTorch model is an ordinary module: exported at one batch size it runs at others, hooks see the whole batch."""

import copy

import numpy as np
import pytest
from conftest import TINY, random_images, random_weights
from implementations import torch_model

pytestmark = pytest.mark.torch
OTHERS = (1, 2, 7, 40)


@pytest.fixture(scope="module")
def model():
    import torch

    return torch_model(random_weights(TINY), TINY, param_dtype=torch.float32)


def images(count):
    import torch

    return torch.from_numpy(random_images(TINY, count)).permute(0, 3, 1, 2).contiguous()


def logits(model, count):
    import torch

    with torch.no_grad():
        return model(images(count)).numpy()


def runs_at_every_batch_size(run, model):
    for count in OTHERS:
        actual, expected = run(images(count)), logits(model, count)
        assert actual.shape == (count, TINY.num_classes)
        assert np.abs(np.asarray(actual) - expected).max() <= 2e-6 * np.abs(expected).max()  # measured: 3e-7


def test_torch_export_at_one_batch_size_runs_at_others(model):
    import torch

    with torch.no_grad():
        program = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        runs_at_every_batch_size(program.module(), model)


@pytest.mark.filterwarnings("ignore")  # of the tracer; naming their class would import PyTorch where it is absent
def test_a_trace_at_one_batch_size_runs_at_others(model):
    import torch

    with torch.no_grad():
        runs_at_every_batch_size(torch.jit.trace(model, images(32)), model)


@pytest.mark.filterwarnings("ignore")  # of the exporter
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


def test_hooks_see_the_whole_batch_and_microbatches_give_what_it_gives(monkeypatch, model):
    import torch

    from mixer_jax import inputs
    from mixer_jax.torch_model import in_microbatches

    monkeypatch.setattr(inputs, "CPU_CACHE", 2 * 4 * TINY.num_tokens * TINY.channels_mlp_dim)
    model, batch_sizes = copy.deepcopy(model), []
    model.stem.register_forward_hook(lambda module, inputs, output: batch_sizes.append(len(output)))
    model(images(5))
    with torch.inference_mode():
        expected = model(images(5)).numpy()
        actual = in_microbatches(model, images(5), TINY).numpy()
    assert np.abs(actual - expected).max() <= 2e-6 * np.abs(expected).max()
    assert batch_sizes == [5, 5, 2, 2, 1]
