"""What saves memory changes no result: blocks run again instead of kept, sums kept on the host."""

from __future__ import annotations

import weakref

import pytest
import torch

from lapora.config import FitSettings, PredictSettings
from lapora.curvature.backward import Linearisation
from lapora.curvature.kfac import KronObserver
from lapora.curvature.nystrom import NystromSketch
from lapora.curvature.passes import CurvatureRun, collect
from lapora.likelihoods.base import class_columns
from lapora.models.lora_layers import find_bayesian_layers
from lapora.posterior.structures import fit_structure
from lapora.workflows.fit import fit
from lapora.workflows.predict import predict
from tiny_adapter import command, data_of, fit_tiny, json_lines, make_adapter, model_of
from tiny_models import batches, rows, tiny_causal, tiny_classifier


class Recorder:
    """Everything an observer is shown, in the order of layers."""

    def __init__(self):
        self.inputs, self.gradients, self.finished = {}, {}, []

    def begin(self, batch):
        pass

    def observe_input(self, layer, input_owner, inputs, mask):
        assert layer.name not in self.inputs
        self.inputs[layer.name] = (input_owner, inputs.clone(), mask)
        return inputs

    def observe_gradient(self, layer, kept, gradient):
        assert torch.equal(kept, self.inputs[layer.name][1])
        self.gradients.setdefault(layer.name, []).append(gradient.clone())

    def finish(self, layer):
        self.finished.append(layer.name)

    def end(self, rows, directions):
        pass


def _seen(answers, layers, batch, rerun):
    recorder = Recorder()
    answers.recompute_blocks = rerun
    with Linearisation(answers, layers, recorder) as linearisation:
        logits = linearisation.run(batch, class_columns)
        linearisation.observer = Recorder()
        again = linearisation.run(batch, lambda logits: logits.new_zeros(0, *logits.shape))
    assert torch.equal(logits, again)
    return recorder, logits


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "down_proj", "lm_head"), ("gate_proj",)])
def test_blocks_run_again_show_the_same(targets):
    answers = tiny_causal(3, targets=targets)
    _compare(answers)


def test_blocks_of_a_classifier_run_again_show_the_same():
    _compare(tiny_classifier(3))


def _compare(answers):
    layers = find_bayesian_layers(answers.model)
    (batch,) = batches(answers, rows(4), 4)
    plain, logits = _seen(answers, layers, batch, False)
    again, same = _seen(answers, layers, batch, True)
    assert torch.equal(logits, same)
    assert plain.finished == again.finished
    assert plain.gradients.keys() == again.gradients.keys()
    for name, gradients in plain.gradients.items():
        assert plain.inputs[name][0] == again.inputs[name][0]
        assert torch.equal(plain.inputs[name][1], again.inputs[name][1])
        assert all(torch.equal(one, other) for one, other in zip(gradients, again.gradients[name], strict=True))


def test_only_some_blocks_with_adapters():
    """Blocks without Bayesian layers, below, between and above, pass gradients on."""
    answers = tiny_causal(3)
    layers = [layer for layer in find_bayesian_layers(answers.model) if ".layers.0." in layer.name]
    (batch,) = batches(answers, rows(4), 4)
    plain, _ = _seen(answers, layers, batch, False)
    again, _ = _seen(answers, layers, batch, True)
    assert plain.gradients and plain.finished == again.finished
    for name, gradients in plain.gradients.items():
        assert all(torch.equal(one, other) for one, other in zip(gradients, again.gradients[name], strict=True))


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
def test_every_structure_is_the_same(answers, structure):
    layers = find_bayesian_layers(answers.model)
    encoded = rows(6)
    classes = answers.answer_token_ids.numel() if answers.kind == "causal" else answers.network.num_labels
    found = []
    for rerun in (False, True):
        answers.recompute_blocks = rerun
        run = CurvatureRun(answers, layers, lambda: batches(answers, encoded, 3), [0] * 6, classes)
        found.append(fit_structure(structure, run)[0])
    for one, other in zip(found[0].eigenvalues, found[1].eigenvalues, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


class SavedTensors:
    """The most bytes that autograd holds for backward passes at a time, each storage counted once."""

    def __init__(self):
        self.alive: dict[int, int] = {}
        self.most = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box[0])

    def _pack(self, tensor):
        box, size = [tensor], tensor.untyped_storage().nbytes()

        class Box(list):
            pass

        box = Box(box)
        key = id(box)
        self.alive[key] = size
        weakref.finalize(box, self.alive.pop, key)
        self.most = max(self.most, sum(self.alive.values()))
        return box

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)


def test_less_is_held_for_the_backward_pass():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from lapora.models.outputs import OutputModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=8, num_attention_heads=2, intermediate_size=32
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora).eval().requires_grad_(False)
    answers = OutputModel(model, "causal", 0, [5, 6])
    layers = find_bayesian_layers(model)
    (batch,) = batches(answers, rows(4), 4)
    most = []
    for rerun in (False, True):
        answers.recompute_blocks = rerun
        with SavedTensors() as saved, Linearisation(answers, layers, Recorder()) as linearisation:
            linearisation.run(batch, class_columns)
        most.append(saved.most)
    assert most[1] < most[0] / 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("options"))


def _eigenvalues(result):
    from lapora.storage.saved import SavedPosterior

    return SavedPosterior(result.folder).gaussian().eigenvalues


def test_the_option_on_fit_and_predict(folder, monkeypatch, capfdbinary):
    plain = fit_tiny(folder)
    answers = list(predict(model_of(folder), PredictSettings(), json_lines(5)))
    result = fit(
        model_of(folder, gradient_checkpointing=True), data_of(folder), FitSettings(name="rerun", offload_factors=True)
    )
    for one, other in zip(_eigenvalues(plain), _eigenvalues(result), strict=True):
        assert torch.equal(one, other)
    found = list(predict(model_of(folder, gradient_checkpointing=True), PredictSettings(), json_lines(5)))
    assert found == answers
    arguments = ("fit", folder / "adapter", "--data", folder / "task.yaml", "--data-dir", folder / "data")
    status, _, err = command(
        monkeypatch, capfdbinary, *arguments, "--name", "cli", "--gradient-checkpointing", "--offload-factors"
    )
    assert status == 0, err
    status, _, err = command(
        monkeypatch, capfdbinary, *arguments, "--name", "no", "--structure", "diag", "--offload-factors"
    )
    assert status == 2 and "--offload-factors goes with --structure kron or ekfac" in err


@pytest.mark.parametrize("rank", [None, 2])
def test_sums_kept_on_the_host(answers, layers, rank):
    encoded = rows(6)
    plain, offloaded = KronObserver("expand", rank), KronObserver("expand", rank, offload=True)
    for observer in (plain, offloaded):
        collect(answers, layers, observer, batches(answers, encoded, 2), targets=[0] * 6)
    one, other = plain.factors(layers), offloaded.factors(layers)
    for name, factors in one.items():
        for part in ("input_sum", "gradient_sum"):
            first, second = getattr(factors, part), getattr(other[name], part)
            if isinstance(first, NystromSketch):
                assert torch.equal(first.image, second.image) and first.trace == second.trace
            else:
                assert torch.equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sums_leave_the_device():
    answers = tiny_causal(2)
    answers.model.to("cuda")
    from lapora.models.outputs import OutputModel

    answers = OutputModel(answers.model, "causal", 0, [5, 6])
    layers = find_bayesian_layers(answers.model)
    observer = KronObserver("expand", offload=True)
    (batch,) = batches(answers, rows(4), 4)
    batch = type(batch)(batch.input_ids.cuda(), batch.attention_mask.cuda(), None, batch.rows, batch.has_padding)
    collect(answers, layers, observer, [batch], targets=[0] * 4)
    for factors in observer.factors(layers).values():
        assert factors.input_sum.device.type == factors.gradient_sum.device.type == "cpu"


def test_sketches_of_one_shape_share_their_test_matrix():
    answers = tiny_causal(3)
    layers = find_bayesian_layers(answers.model)
    observer = KronObserver("expand", rank=2)
    collect(answers, layers, observer, batches(answers, rows(6), 3), targets=[0] * 6)
    sketches = [
        total
        for factors in observer.factors(layers).values()
        for total in (factors.input_sum, factors.gradient_sum)
        if isinstance(total, NystromSketch)
    ]
    by_shape: dict[tuple[int, ...], set[int]] = {}
    for sketch in sketches:
        by_shape.setdefault(tuple(sketch.image.shape), set()).add(sketch.test_matrix.blocks.data_ptr())
    assert sketches and all(len(places) == 1 for places in by_shape.values())
