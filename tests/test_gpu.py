"""What must hold on a GPU as on a CPU. `pytest tests/test_gpu.py --device cpu` runs the same code without one."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from subspace_peft.projections import PROJECTIONS
from tests.adapter import quantised, test_golden_adapter
from tests.cases import BY_NAME, loss, move, moved_base, run, settings, theta_d, wrap
from tests.projections.cases import explicit, make, random
from tests.projections.test_golden import PHILOX


SEEDED = [name for name in PROJECTIONS if name not in ("basis", "coordinate")]
ARCHITECTURES = ("mlp", "convnet", "embeddings", "llama", "gpt2", "vit")
DRAWS = {
    "bits": lambda device: PHILOX.bits(0, 10_000, device),
    "signs": lambda device: PHILOX.signs(0, 10_000, device),
    "uniforms": lambda device: PHILOX.uniforms(0, 10_000, device),
    "integers": lambda device: PHILOX.integers(1000, 0, 10_000, device),
    "permutations": lambda device: PHILOX.permutations(200, 0, 30, device),
}

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")]


@pytest.fixture
def device(request):
    """In float32 without TF32, which rounds to ten bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()
    return torch.device(request.config.getoption("--device"))


def close(on_device: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4) -> None:
    assert on_device.dtype == expected.dtype
    torch.testing.assert_close(on_device.cpu(), expected.cpu(), rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_those_of_the_cpu(draw, device):
    assert torch.equal(DRAWS[draw](device).cpu(), DRAWS[draw](torch.device("cpu")))


def test_normals_are_those_of_the_cpu_to_one_unit_in_the_last_place(device):
    ours, expected = (PHILOX.normals(0, 10_000, each).cpu() for each in (device, torch.device("cpu")))
    assert ours.dtype == expected.dtype == torch.float32
    assert (ours.view(torch.int32) - expected.view(torch.int32)).abs().max() <= 1


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("shape", [(96, 40), (4096, 170)], ids=str)
def test_a_projection_is_that_of_the_cpu(name, shape, device):
    projection = make(name, *shape)
    z, g = random(projection.rows.d, dtype=torch.float32), random(projection.rows.n, dtype=torch.float32)
    P = explicit(projection)
    close(projection(z.to(device)), (P @ z.double()).float())
    close(projection.transpose(g.to(device)), (P.mT @ g.double()).float())


@pytest.mark.parametrize("name", test_golden_adapter.ADAPTERS)
@torch.no_grad()
def test_golden_adapters_give_their_outputs(name, device):
    adapters = test_golden_adapter
    expected = adapters.golden(name)["outputs"]
    model = PeftModel.from_pretrained(adapters.base(name).to(device), adapters.FOLDER / name).eval()
    assert theta_d(model).device.type == device.type
    close(model(adapters.inputs(name).to(device)), expected)


@pytest.mark.parametrize("changes", [{}, {"projection": "kronecker"}, {"projection": "sparse"}], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_adapted_model_is_the_moved_model(name, changes, device):
    case = BY_NAME[name]
    model = wrap(case, **changes)
    move(model)
    plain, x = moved_base(case, model).to(device), case.batch().to(device)
    loss(model, case.batch()).backward()
    gradient = theta_d(model).grad.clone()
    theta_d(model).grad = None
    model.to(device)
    with torch.no_grad():
        close(run(model, x), run(plain, x))
    _loss(model, x).backward()
    close(theta_d(model).grad, gradient, rtol=1e-3)


def _loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`cases.loss`, whose weights are drawn on the CPU."""
    out = run(model, x).double()
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.device)
    return (out * probe).sum() / out.numel() ** 0.5


@pytest.mark.parametrize("coordinates", ["weight", "low_rank"])
@pytest.mark.parametrize("name", SEEDED)
def test_half_precision_acts_below_the_resolution(name, coordinates, device):
    rank = 4 if coordinates == "low_rank" else None
    base = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)).to(device, torch.bfloat16)
    with torch.no_grad():
        base[0].weight.fill_(1)
    config = settings(projection=name, d=None if name == "identity" else 50, coordinates=coordinates, rank=rank)
    model = get_peft_model(base, config).eval()
    move(model, size=1)
    layer, half = model.base_model.model[0], torch.randn(16, 32).to(device, torch.bfloat16)
    with torch.no_grad():
        theta_d(model).mul_(5e-4 / layer.get_delta_weight("default").abs().max())
        ideal = torch.cat([half, -half], -1).double() @ layer.get_delta_weight("default").double().T
        assert (model(torch.cat([half, -half], -1)).double() - ideal).norm() < 0.01 * ideal.norm()
    assert theta_d(model).dtype == torch.float32


@pytest.mark.parametrize("changes", [{"projection": "fastjl"}, {"projection": "kronecker"}], ids=str)
def test_a_compiled_step_is_that_of_the_model(changes, device):
    model = wrap(BY_NAME["mlp"], **changes).to(device).train()
    move(model)
    x = BY_NAME["mlp"].batch().to(device)
    compiled = torch.compile(model, fullgraph=True)
    gradients = []
    for call in (compiled, model):
        theta_d(model).grad = None
        _loss(call, x).backward()
        gradients.append(theta_d(model).grad.clone())
    close(*gradients, rtol=1e-3)


@pytest.mark.parametrize("projection", ["fastjl", "kronecker", "sparse"])
def test_a_four_bit_base_has_the_gradient_of_the_dequantised_one(projection, device):
    gradients = []
    for build in (quantised.quantised, quantised.dequantised):
        model = get_peft_model(
            build("4-bit").to(device), settings(projection=projection, target_modules=["fc1", "fc2", "out"])
        )
        move(model)
        _loss(model, quantised.x().to(device)).backward()
        gradients.append(theta_d(model).grad)
    close(*gradients)
