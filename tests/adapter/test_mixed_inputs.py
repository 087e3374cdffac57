"""Mixed batches of models whose modules get other inputs than the batch, or repeat it in a beam search."""

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from tests.cases import move, run, settings
from tests.models import SMALL, TEXT


NAMES = ["one", "two", "__base__"]
pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")


class Positions(nn.Module):
    """As many language models written by hand: the positions are counted in the forward."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(23, 6), nn.Embedding(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.tokens(x) + self.positions(torch.arange(x.shape[1])))


class Columns(nn.Module):
    """A table whose columns are categories, each with an embedding."""

    def __init__(self):
        super().__init__()
        self.columns, self.head = nn.ModuleList(nn.Embedding(23, 4) for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(sum(embed(x[:, i]) for i, embed in enumerate(self.columns)))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Linear(4, 4)

    def forward(self, x):
        assert self.child.weight.dtype == torch.float32
        return self.read(x)

    def read(self, x):
        return nn.functional.linear(x, self.child.weight, self.child.bias)


class Caller(Reader):
    def read(self, x):
        return self.child.forward(x)


def t5():
    config = transformers.T5Config(
        vocab_size=23, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0, eos_token_id=22
    )
    return transformers.T5ForConditionalGeneration(config)


def roberta():
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT, **SMALL))


def adapted(build, targets="all", also=None):
    """A model with two adapters that move it visibly."""
    torch.manual_seed(0)
    model = get_peft_model(build(), settings(target_modules=targets), "one")
    model.add_adapter("two", settings(target_modules=also or targets, seed=1))
    for seed, name in enumerate(("one", "two")):
        move(model, name, size=0.3, seed=seed)
    return model.eval()


def tokens(*shape):
    return torch.randint(3, 20, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def one_by_one(model, names, call):
    """The oracle: the whole batch with each adapter in turn, of which each sample takes its own row."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(call(model)[i])
        else:
            model.set_adapter(name)
            rows.append(call(model)[i])
    return torch.stack(rows)


def check(model, x, names=NAMES, **kwargs):
    with torch.no_grad():
        mixed = run(model, x, adapter_names=names, **kwargs)
    expected = one_by_one(model, names, lambda model: run(model, x, **kwargs))
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [3, 5])
def test_positions_are_refused_by_name_however_many_there_are(length):
    """With as many positions as samples they look like a batch."""
    model = adapted(Positions)
    with pytest.raises(
        ValueError, match="`adapter_names` must .* `positions`.* run such a batch one adapter at a time"
    ):
        model(tokens(3, length), adapter_names=NAMES)
    check(adapted(Positions, ["tokens", "head"]), tokens(3, length))


@pytest.mark.parametrize("length", [3, 5])
def test_a_batch_of_one_adapter_runs_whatever_the_inputs_are(length):
    for build, kwargs in ((Positions, {}), (t5, {"decoder_input_ids": tokens(3, length)})):
        check(adapted(build), tokens(3, length), ["two", "two", "two"], **kwargs)


def test_adapters_that_leave_a_module_alone_run_it_together():
    model = adapted(Positions, ["tokens", "head"], ["tokens"])
    check(model, tokens(3, 3))


@pytest.mark.parametrize("rows", [3, 5])
def test_slices_of_the_input_are_samples(rows):
    check(adapted(Columns), tokens(rows, 3), [*NAMES, "one", "two"][:rows])


@pytest.mark.parametrize("length", [3, 5])
def test_relative_positions_of_t5_are_refused_by_name(length):
    x = tokens(3, length)
    with pytest.raises(ValueError, match="`adapter_names` must .*`encoder.*relative_attention_bias`"):
        adapted(t5)(x, decoder_input_ids=x, adapter_names=NAMES)
    check(adapted(t5, r".*\.(q|v|wi|wo)|shared|lm_head"), x, decoder_input_ids=x)


def test_positions_that_are_computed_from_the_batch_are_samples():
    """Not where there are as many as samples: then nothing tells them from others."""
    check(adapted(roberta), tokens(3, 5))
    with pytest.raises(ValueError, match="`adapter_names` must split .* `roberta.embeddings.token_type_emb"):
        adapted(roberta)(tokens(3, 3), adapter_names=NAMES)


def test_a_parameter_that_the_model_reads_is_refused():
    model, x = adapted(Reader), torch.randn(3, 4)
    with pytest.raises(ValueError, match="it reads Linear, which the adapters of its samples move differently"):
        model(x, adapter_names=NAMES)
    check(model, x, ["two", "two", "two"])


def test_a_module_whose_forward_is_called_by_name_is_split_too():
    check(adapted(Caller), torch.randn(3, 4))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("build", [t5, lambda: transformers.BartForConditionalGeneration(bart_config())])
def test_a_beam_search_repeats_samples_in_the_decoder_alone(build, how, beams):
    model = adapted(build, r".*(q|v|q_proj|v_proj|fc1|wo|shared)")
    settings = {"num_beams": beams, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    if how == "config":
        settings = {"generation_config": transformers.GenerationConfig(**settings, decoder_start_token_id=0)}
    x = tokens(3, 5)
    mixed = model.generate(input_ids=x, adapter_names=NAMES, **settings)
    assert torch.equal(mixed, one_by_one(model, NAMES, lambda model: model.generate(input_ids=x, **settings)))


def bart_config():
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 12))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.BartConfig(**TEXT, d_model=8, **layers, **heads, forced_eos_token_id=None)
