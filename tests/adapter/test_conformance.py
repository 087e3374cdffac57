"""Conformance: the adapted model is the moved model, whichever way it is asked."""

import copy
import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig
from subspace_peft.adapter import forming
from subspace_peft.projections.sparse import Sparse
from tests.architectures import ARCHITECTURES, Architecture
from tests.cases import CASES, Case, assert_same_state, move, settings, theta_d, tree
from tests.oracle import Batch, Oracle, distances, flat_outputs, in_dtype, in_float64, increments, says
from tests.torch_modules import TORCH_MODULES


ROUNDING = {"outputs in training": 2e-5, "gradient": 1e-4, "outputs": 2e-5}  # of float32, relative
SIZE = 0.05  # of the entries of theta_d, and so of the increments: the rows of P have norm 1
AS_LORA = 3  # times LoRA's own distance in bfloat16; that of the gradient also as for a plain model of rounded weights
LORA_REFUSES = ("conv1d", "out_proj")  # state-space models read the weights of these, torch's attention that of one


pytestmark = pytest.mark.filterwarnings(
    "ignore:Model .*tie:UserWarning", "ignore:Setting .save_embedding_layers", "ignore:LSTM with projections"
)


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix."""

    case: Case | Architecture
    targets: str
    coordinates: str
    dtype: torch.dtype

    def __repr__(self) -> str:
        return f"{self.case!r}-{self.targets}-{self.coordinates}-{str(self.dtype).removeprefix('torch.')}"


def targets_of(case: Case | Architecture) -> tuple[str, ...]:
    has_linear = repr(case) not in NO_LINEAR and _has(case, lambda module: isinstance(module, nn.Linear))
    return ("all", "all-linear") if has_linear else ("all",)


def coordinates_of(case: Case | Architecture) -> tuple[str, ...]:
    has_matrix = repr(case) != "norms" and _has(case, lambda module: any(p.dim() > 1 for p in module.parameters()))
    return ("weight", "low_rank") if has_matrix else ("weight",)


def _has(case: Case | Architecture, what: Callable[[nn.Module], bool]) -> bool:
    return case not in TORCH_MODULES or any(what(module) for module in case.model().modules())


NO_LINEAR = ("norms", "convs", "recurrent", "ReformerModelWithLMHead")  # or none that trains: reversible layers
MATRIX = [
    Cell(case, targets, coordinates, dtype)
    for case in [*CASES, *TORCH_MODULES, *ARCHITECTURES]
    for targets in targets_of(case)
    for coordinates in coordinates_of(case)
    for dtype in (torch.float32, torch.bfloat16)
]


@dataclass(frozen=True)
class Base:
    """A plain model, which never runs, its inputs, and the outputs of a copy."""

    plain: nn.Module
    batch: Batch
    outputs: Tensor


@functools.lru_cache(maxsize=2)
@torch.no_grad()
def base_of(case: Case | Architecture, dtype: torch.dtype) -> Base:
    plain, batch = case.model().to(dtype).requires_grad_(False), in_dtype(case.batch(), dtype)
    return Base(plain, batch, flat_outputs(without_fast_path(copy.deepcopy(plain)), batch))


def without_fast_path(model: nn.Module) -> nn.Module:
    """The fast path of nn.TransformerEncoderLayer, which a hook turns off, rounds otherwise."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_hook(lambda *args: None)
    return model


@pytest.fixture(scope="module", autouse=True)
def forms_everything_again():
    """Small tensors too, as large ones are."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(forming, "HELD_ENTRIES", 0)
        yield


class Life:
    """An adapter that starts at zero, is moved, and runs in training mode once."""

    def __init__(self, cell: Cell):
        self.base = base_of(cell.case, cell.dtype)
        self.model = get_peft_model(copy.deepcopy(self.base.plain), self._config(cell)).eval()
        self.start = self.outputs(self.model)
        move(self.model, size=SIZE)
        moves, vector = increments(self.model), theta_d(self.model)
        self.oracle = Oracle(self.base.plain, moves, vector)
        self.expected = self.oracle.says(in_dtype(self.base.batch, torch.float64))
        self.said = says(self.model, self.base.batch, lambda loss: torch.autograd.grad(loss, vector)[0])
        self.tolerance = ROUNDING
        if cell.dtype != torch.float32:
            least = torch.finfo(cell.dtype).eps / 4
            lora = {key: max(far, least) for key, far in loras_distances(cell.case, cell.dtype).items()}
            rounded = Oracle(self.base.plain, moves, vector, rounded=True).says(self.base.batch)
            gradient = max(distances(rounded, self.expected)["gradient"], lora["outputs in training"])
            self.tolerance = {key: AS_LORA * value for key, value in (lora | {"gradient": gradient}).items()}

    def _config(self, cell: Cell) -> SubspaceConfig:
        changes = {}
        if cell.coordinates == "low_rank":
            matrices = [parameter for parameter in self.base.plain.parameters() if parameter.dim() > 1]
            rank = min(2, *(min(len(matrix), matrix[0].numel()) for matrix in matrices))
            changes = {"coordinates": "low_rank", "rank": rank}
        return settings(d=6, projection="sparse", target_modules=cell.targets, **changes)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        return flat_outputs(model, self.base.batch)

    def assert_moved(self, said: dict[str, Tensor]) -> None:
        far = distances(said, self.expected)
        assert not {key: (far[key], self.tolerance[key]) for key in said if not far[key] <= self.tolerance[key]}


@functools.cache
def loras_distances(case: Case | Architecture, dtype: torch.dtype) -> dict[str, float]:
    """How far LoRA of all linear layers is from what it is in float64, or the base of a model without any.

    LoRA's increments are as large as ours.
    """
    base = base_of(case, dtype)
    model, batch = copy.deepcopy(base.plain), base.batch
    targets = [
        re.escape(name)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and not name.endswith(LORA_REFUSES)
    ]
    with warnings.catch_warnings(action="ignore"):
        if targets:
            config = LoraConfig(r=2, target_modules="|".join(targets), init_lora_weights=False)
            model = get_peft_model(model, config).base_model.model
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                increment = layer.get_delta_weight("default")
                layer.scale_layer(SIZE * increment.numel() ** 0.5 / increment.norm().item())
        exact = says(in_float64(model), in_dtype(batch, torch.float64))
        return distances(says(model, batch), exact)


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """The rows of P of one tensor are the same in every cell: drawing them anew would take a third of the time."""
    draw, drawn = Sparse.draw, {}

    def draw_once(self, device):
        key = self.rows.name, self.rows.n, device
        if key not in drawn:
            drawn[key] = draw(self, device)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sparse, "draw", draw_once)
        yield


@pytest.fixture(scope="module", params=MATRIX, ids=repr)
def life(request) -> Life:
    return Life(request.param)


def test_theta_d_of_zero_is_the_base_bit_for_bit(life):
    assert torch.equal(life.start, life.base.outputs)


def test_outputs_and_gradient_are_those_of_the_moved_model(life):
    life.assert_moved(life.said)


def test_a_disabled_adapter_leaves_the_base_bit_for_bit(life):
    with life.model.disable_adapter():
        assert torch.equal(life.outputs(life.model), life.base.outputs)
    assert torch.equal(life.outputs(life.model), life.said["outputs"])


def test_a_reloaded_adapter_says_the_same_and_unloaded_leaves_the_base_bit_for_bit(life, tmp_path):
    life.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(life.base.plain), tmp_path).eval()
    assert torch.equal(life.outputs(loaded), life.said["outputs"])
    unloaded = loaded.unload()
    assert tree(unloaded) == tree(life.base.plain)
    assert_same_state(unloaded, life.base.plain.state_dict())
    assert torch.equal(life.outputs(without_fast_path(unloaded)), life.base.outputs)


def test_a_merged_adapter_is_the_moved_model(life):
    """The last one, because it ends the life: a copy for each test would take as long as all of them."""
    life.model.merge_adapter()
    life.assert_moved({"outputs": life.outputs(life.model)})
    life.model.unmerge_adapter()
    life.assert_moved({"outputs": life.outputs(life.model)})
    merged = life.model.merge_and_unload()
    assert tree(merged) == tree(life.base.plain)
    life.assert_moved({"outputs": life.outputs(merged)})
    if life.tolerance is ROUNDING:
        for name, tensor in life.oracle.model.state_dict().items():
            torch.testing.assert_close(merged.state_dict()[name].to(tensor.dtype), tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "FalconH1", "Jamba", "Lfm2", "Qwen3Next", "RecurrentGemma"])
@torch.no_grad()
def test_a_state_space_model_generates_what_the_merged_model_does(name):
    """Its step for one token reads other weights, or the same in another way, than the forward of a sequence."""
    case = next(case for case in ARCHITECTURES if repr(case) == f"{name}ForCausalLM")
    model = get_peft_model(case.model(), settings(projection="sparse")).eval()
    move(model, size=2 * SIZE)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = model.generate(**case.batch(), **options).logits
    for adapted, merged in zip(
        logits, model.merge_and_unload().generate(**case.batch(), **options).logits, strict=True
    ):
        torch.testing.assert_close(adapted, merged)
