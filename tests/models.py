"""Small models: one for each kind of module, and for each way to share a tensor or a module."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


class MLP(nn.Module):
    """Two linears."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class ConvNet(nn.Module):
    """Two convolutions with batch norm, and a linear."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Norms(nn.Module):
    """Layer, RMS, group and instance norm."""

    def __init__(self):
        super().__init__()
        self.layer, self.rms = nn.LayerNorm(6), nn.RMSNorm(6)
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)

    def forward(self, x):
        return self.instance(self.group(self.rms(torch.tanh(self.layer(x)))).tanh())


class Convs(nn.Module):
    """Convolutions in one to three dimensions: plain, grouped, dilated and transposed."""

    def __init__(self):
        super().__init__()
        self.one, self.one_up = nn.Conv1d(2, 4, 3, padding="same"), nn.ConvTranspose1d(4, 2, 2)
        self.two, self.two_up = nn.Conv2d(2, 4, 3, dilation=2, groups=2), nn.ConvTranspose2d(4, 2, 3, stride=2)
        self.three, self.three_up = nn.Conv3d(2, 2, 2, bias=False), nn.ConvTranspose3d(2, 1, 2)

    def forward(self, x):  # [batch, 2, 512]
        one = self.one_up(torch.tanh(self.one(x)))
        two = self.two_up(torch.tanh(self.two(one[..., :64].unflatten(2, (8, 8)))))
        three = self.three_up(torch.tanh(self.three(one[..., :64].unflatten(2, (4, 4, 4)))))
        return torch.cat([t.flatten(1) for t in (one, two, three)], 1)


class Embeddings(nn.Module):
    """An embedding, a bag of embeddings, and transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        self.tokens, self.bag = nn.Embedding(11, 4), nn.EmbeddingBag(11, 4)
        self.mix = Conv1D(5, 4)

    def forward(self, ids):
        return self.mix(self.tokens(ids) + self.bag(ids).unsqueeze(1))


class Padded(nn.Module):
    """Rows of padding: the first, the last, and one in the middle of an embedding tied to the output layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Embedding(11, 4, padding_idx=0), nn.EmbeddingBag(11, 4, padding_idx=-1)
        self.middle, self.out = nn.Embedding(11, 4, padding_idx=2), nn.Linear(4, 11, bias=False)
        self.out.weight = self.middle.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.first(ids) + self.last(ids).unsqueeze(1) + self.middle(ids)))


class Attention(nn.Module):
    """Multi-head attention with one input projection for query, key and value, and with three."""

    def __init__(self):
        super().__init__()
        self.packed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.split = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x):
        x = self.packed(x, x, x)[0]
        return self.split(x, x[..., :6], x[..., :6], need_weights=False)[0]


class Recurrent(nn.Module):
    """An LSTM with two layers and a bidirectional GRU."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(4, 5, 2, batch_first=True), nn.GRU(5, 3, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.gru(self.lstm(x)[0])[0]


class Scale(nn.Module):
    """A custom module that owns parameters and has a child with more."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.zeros(()))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) * self.gain + self.shift


class Bare(nn.Module):
    """A custom module inside another."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = Scale(), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.scale(x).tanh())


class Tied(nn.Module):
    """An embedding tied to the output layer."""

    def __init__(self):
        super().__init__()
        self.tokens, self.middle = nn.Embedding(11, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 11, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.middle(self.tokens(ids))))


class SharedModules(nn.Module):
    """A module under two names, which runs twice, and one with a child under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x):
        for layer in (self.first, self.second, *self.blocks):
            x = layer(torch.tanh(x))
        return x


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


TEXT = {"vocab_size": 23, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**TEXT, **SMALL, num_key_value_heads=1, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**TEXT, n_embd=8, n_layer=2, n_head=2, n_positions=32, **off)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**TEXT, **SMALL, max_position_embeddings=32, num_labels=3, **off)
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3, **off)
    return transformers.ViTForImageClassification(config)
