"""Architectures: transformers' models, built tiny from their configs. A new one is one entry of ARCHITECTURES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from tests.cases import seeded


Inputs = dict[str, Tensor]


def tokens(batch: int = 3) -> Inputs:
    return {"input_ids": torch.randint(3, 30, (batch, 8))}


def both_tokens() -> Inputs:
    return tokens() | {"decoder_input_ids": torch.randint(3, 30, (3, 4))}


def pixels(batch: int = 3) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def pixels_and_tokens() -> Inputs:
    return pixels() | tokens()


def waveform() -> Inputs:
    return {"input_values": torch.randn(3, 400)}


def spectrogram() -> Inputs:
    return {"input_values": torch.randn(3, 32, 16)}


def mel_and_tokens() -> Inputs:
    return {"input_features": torch.randn(3, 8, 16), "decoder_input_ids": torch.randint(3, 30, (3, 4))}


@dataclass(frozen=True, eq=False)
class Architecture:
    """One of transformers' model classes, the inputs that it runs on, and the values of its config."""

    head: str
    inputs: Callable[[], Inputs]
    settings: dict

    def model(self) -> nn.Module:
        return seeded(self.build)

    def build(self) -> nn.Module:
        kind = getattr(transformers, self.head)
        config = kind.config_class(**self.settings)
        _without_randomness(config)
        model = kind(config)
        return Inside(model) if list(model.parameters(recurse=False)) else model

    def batch(self) -> Inputs:
        torch.manual_seed(1)
        return self.inputs()

    def __repr__(self) -> str:
        return self.head


class Inside(nn.Module):
    """A model as the child of another module, because target_modules="all" refuses parameters that the root owns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


def _without_randomness(config: transformers.PreTrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _without_randomness(value)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)


TOKENS = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = TOKENS | SMALL | {"max_position_embeddings": 32}
LABELS = {"num_labels": 7}
EMBEDDING = {"embedding_size": 8}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
SEQ2SEQ = TOKENS | ENCODER | DECODER | {"d_model": 16, "max_position_embeddings": 32}
T5 = (
    TOKENS
    | {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    | {"decoder_start_token_id": 0}
)
# Every token goes to all experts: in bfloat16 one near a tie would go to others.
EXPERTS = GROUPED | {"num_experts_per_tok": 3, "moe_intermediate_size": 16, "intermediate_size": 16}
STATES = TOKENS | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 3, "expand": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
IMAGE = LABELS | {"image_size": 32, "num_channels": 3}
VIT = SMALL | IMAGE | {"patch_size": 16}
WINDOWS = IMAGE | {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
PYRAMID = IMAGE | {"hidden_sizes": [8, 16], "depths": [1, 1]}
BLOCKS = PYRAMID | {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2]}
RESNET = PYRAMID | {"embedding_size": 8, "layer_type": "basic", "model_type": "resnet", "out_features": ["stage2"]}
FEATURES = {"conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
SPEECH = SMALL | LABELS | FEATURES | POSITIONS | {"vocab_size": 30, "classifier_proj_size": 8}


A = Architecture
ARCHITECTURES = [
    # text encoders
    A("BertForSequenceClassification", tokens, TEXT | LABELS),
    A("RobertaForMaskedLM", tokens, TEXT | {"max_position_embeddings": 40}),
    A("ElectraForTokenClassification", tokens, TEXT | EMBEDDING | LABELS),
    A("DebertaForMaskedLM", tokens, TEXT | DISENTANGLED),
    A("DebertaV2ForMaskedLM", tokens, TEXT | DISENTANGLED | {"conv_kernel_size": 3}),
    A("DistilBertForMaskedLM", tokens, TOKENS | {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}),
    A("AlbertForMaskedLM", tokens, TEXT | EMBEDDING),
    A("MPNetForMaskedLM", tokens, TEXT),
    A("MobileBertForMaskedLM", tokens, TEXT | EMBEDDING | {"intra_bottleneck_size": 8}),
    A("ModernBertForMaskedLM", tokens, TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
    A("XLNetLMHeadModel", tokens, TOKENS | {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
    A(
        "LayoutLMv3ForTokenClassification",
        tokens,
        TEXT
        | LABELS
        | {"visual_embed": False, "coordinate_size": 2, "shape_size": 4, "max_2d_position_embeddings": 64},
    ),
    A(
        "PerceiverForMaskedLM",
        lambda: {"inputs": tokens()["input_ids"]},
        {"vocab_size": 30, "max_position_embeddings": 8, "num_latents": 4, "d_latents": 16, "d_model": 16}
        | {"num_self_attends_per_block": 1, "num_self_attention_heads": 2, "num_cross_attention_heads": 2}
        | {"qk_channels": 16, "v_channels": 16},
    ),
    A(
        "ReformerModelWithLMHead",
        tokens,
        TEXT
        | {"is_decoder": True, "attn_layers": ["local", "local"], "local_attn_chunk_length": 4}
        | {"axial_pos_shape": [2, 4], "axial_pos_embds_dim": [8, 8], "attention_head_size": 8},
    ),
    # text decoders
    A("LlamaForCausalLM", tokens, GROUPED),
    A("MistralForCausalLM", tokens, GROUPED),
    A("Qwen2ForCausalLM", tokens, GROUPED | {"tie_word_embeddings": True}),
    A("Qwen3ForCausalLM", tokens, GROUPED),
    A("Gemma2ForCausalLM", tokens, GROUPED),
    A("Gemma3ForCausalLM", tokens, GROUPED),
    A("PhiForCausalLM", tokens, TEXT),
    A("GPT2LMHeadModel", tokens, TOKENS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    A("GPTNeoXForCausalLM", tokens, TEXT),
    A("OPTForCausalLM", tokens, TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 8}),
    A("BloomForCausalLM", tokens, TOKENS | {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    A("FalconForCausalLM", tokens, TEXT),
    # encoder-decoders
    A("T5ForConditionalGeneration", both_tokens, T5),
    A("BartForConditionalGeneration", both_tokens, SEQ2SEQ),
    A(
        "ProphetNetForConditionalGeneration",
        both_tokens,
        TOKENS
        | {"hidden_size": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
        | {"num_encoder_layers": 2, "num_encoder_attention_heads": 2}
        | {"num_decoder_layers": 2, "num_decoder_attention_heads": 2},
    ),
    # state-space models
    A("MambaForCausalLM", tokens, STATES),
    A("Mamba2ForCausalLM", tokens, STATES | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    A("RwkvForCausalLM", tokens, TEXT | {"attention_hidden_size": 16, "context_length": 32, "rescale_every": 0}),
    A(
        "RecurrentGemmaForCausalLM",
        tokens,
        GROUPED | {"lru_width": 16, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    A("FalconH1ForCausalLM", tokens, GROUPED | MAMBA2 | {"mamba_d_ssm": 32}),
    A("Lfm2ForCausalLM", tokens, GROUPED | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    # mixture of experts, the last two with state-space layers
    A("MixtralForCausalLM", tokens, EXPERTS | {"num_local_experts": 3}),
    A("Qwen3MoeForCausalLM", tokens, EXPERTS | {"num_experts": 3}),
    A("GptOssForCausalLM", tokens, EXPERTS | {"num_local_experts": 3}),
    A(
        "SwitchTransformersForConditionalGeneration",
        both_tokens,
        T5
        | {"num_decoder_layers": 2, "num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    A(
        "DeepseekV3ForCausalLM",
        tokens,
        TEXT
        | {"n_routed_experts": 3, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
        | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        | {"head_dim": 4, "first_k_dense_replace": 1},
    ),
    A(
        "JambaForCausalLM",
        tokens,
        GROUPED
        | {"mamba_d_state": 4, "mamba_dt_rank": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"num_experts": 2, "expert_layer_period": 2, "expert_layer_offset": 0},
    ),
    A(
        "Qwen3NextForCausalLM",
        tokens,
        EXPERTS
        | {"num_experts": 3, "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8}
        | {"linear_num_key_heads": 1, "linear_value_head_dim": 8, "linear_num_value_heads": 2}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    # vision transformers and convnets
    A("ViTForImageClassification", pixels, VIT),
    A("BeitForImageClassification", pixels, VIT | {"use_relative_position_bias": True}),
    A("Dinov2ForImageClassification", pixels, VIT),
    A("SwinForImageClassification", pixels, WINDOWS),
    A("Swinv2ForImageClassification", pixels, WINDOWS),
    A("ConvNextV2ForImageClassification", pixels, PYRAMID | {"num_stages": 2}),
    A("ResNetForImageClassification", pixels, PYRAMID | {"embedding_size": 8}),
    A("PoolFormerForImageClassification", pixels, BLOCKS | {"padding": [2, 1]}),
    A(
        "SegformerForImageClassification",
        pixels,
        BLOCKS | {"sr_ratios": [2, 1], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
    ),
    A(
        "LevitForImageClassification",
        lambda: pixels(16),  # batch norm of pooled features
        IMAGE
        | {"hidden_sizes": [16, 16], "depths": [1, 1], "num_attention_heads": [2, 2], "key_dim": [8, 8]}
        | {"attention_ratio": [2, 2], "mlp_ratio": [2, 2], "down_ops": [["Subsample", 8, 2, 4, 2, 2], [""]]},
    ),
    A(
        "MobileViTForImageClassification",
        pixels,
        IMAGE
        | {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16]}
        | {"num_attention_heads": 2, "patch_size": 2},
    ),
    A(
        "EfficientNetForImageClassification",
        pixels,
        IMAGE
        | {"in_channels": [32, 32], "out_channels": [32, 32], "hidden_dim": 320, "width_coefficient": 0.25}
        | {"kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 2]},
    ),
    A(
        "CvtForImageClassification",
        pixels,
        IMAGE
        | {"patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "embed_dim": [8, 16]}
        | {"num_heads": [1, 2], "depth": [1, 2], "mlp_ratio": [2.0, 2.0], "cls_token": [False, True]}
        | {"drop_path_rate": [0.0, 0.0]},
    ),
    A("DetrForObjectDetection", pixels, SEQ2SEQ | {"num_queries": 4, "backbone_config": RESNET}),
    # audio
    A("Wav2Vec2ForCTC", waveform, SPEECH),
    A("Wav2Vec2ForXVector", waveform, SPEECH | {"tdnn_dim": [8, 8], "tdnn_kernel": [3, 2], "tdnn_dilation": [1, 2]}),
    A("HubertForSequenceClassification", waveform, SPEECH),
    A("WavLMForCTC", waveform, SPEECH),
    A("SEWForCTC", waveform, SPEECH),
    A(
        "WhisperForConditionalGeneration",
        mel_and_tokens,
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
    ),
    A(
        "ASTForAudioClassification",
        spectrogram,
        SMALL | LABELS | {"patch_size": 8, "max_length": 32, "num_mel_bins": 16},
    ),
    # text and images
    A("CLIPModel", pixels_and_tokens, {"text_config": TEXT, "vision_config": VIT, "projection_dim": 8}),
]
