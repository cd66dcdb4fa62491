# SPDX-License-Identifier: Apache-2.0
"""Tiny encoders and vision-language models, and something for each to read."""

from __future__ import annotations

import torch
import transformers as tf

from conftest import VOCABULARY

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LANGUAGE = TEXT | {"num_key_value_heads": 1, "eos_token_id": None}
IMAGE = 5
"""The token that stands for a piece of an image."""


def make(model, config, *, scale=0.3):
    """A model all of whose matrices are large: many families leave parts of theirs out of `initializer_range`."""
    torch.manual_seed(0)
    made = model(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.normal_(0, scale)
    return made


def pixels(count=2, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def token_batch():
    """Rows of 20 and 13 tokens, padded on the right."""
    ids = torch.randint(6, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 13:], mask[1, 13:] = 0, 0
    return ids, mask


TEXT_ENCODERS = {
    "bert": lambda: make(tf.BertModel, tf.BertConfig(**TEXT)),
    "bert for masked words": lambda: make(tf.BertForMaskedLM, tf.BertConfig(**TEXT)),
    "roberta": lambda: make(tf.RobertaModel, tf.RobertaConfig(**TEXT)),
    "electra": lambda: make(tf.ElectraModel, tf.ElectraConfig(**TEXT, embedding_size=16)),
    "distilbert": lambda: make(
        tf.DistilBertModel,
        tf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=2, pad_token_id=0),
    ),
    "modernbert (local layers, rotary)": lambda: make(
        tf.ModernBertModel,
        tf.ModernBertConfig(**TEXT | {"num_hidden_layers": 4}, local_attention=8, cls_token_id=1, sep_token_id=2),
    ),
    "gemma 3 (bidirectional)": lambda: embedding_gemma(),
}
IMAGE_ENCODERS = {
    "vit": lambda: make(tf.ViTModel, tf.ViTConfig(**VISION)),
    "dinov2": lambda: make(tf.Dinov2Model, tf.Dinov2Config(**VISION)),
    "dinov3 (rotary)": lambda: make(tf.DINOv3ViTModel, tf.DINOv3ViTConfig(**VISION)),
    "siglip": lambda: make(tf.SiglipVisionModel, tf.SiglipVisionConfig(**VISION)),
    "clip": lambda: make(tf.CLIPVisionModelWithProjection, tf.CLIPVisionConfig(**VISION, projection_dim=16)),
    "beit": lambda: make(tf.BeitModel, tf.BeitConfig(**VISION)),
}


def llava():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**LANGUAGE),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return make(tf.LlavaForConditionalGeneration, config)


def qwen2_vl():
    config = tf.Qwen2VLConfig(
        text_config=LANGUAGE
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE,
        vision_start_token_id=3,
        vision_end_token_id=4,
        video_token_id=96,
    )
    return make(tf.Qwen2VLForConditionalGeneration, config)


def smolvlm():
    config = tf.SmolVLMConfig(
        vision_config=VISION | {"model_type": "smolvlm_vision"},
        text_config=LANGUAGE | {"model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return make(tf.SmolVLMForConditionalGeneration, config)


def llava_next():
    """Its images come as tiles with their sizes, a form that AQUA does not know how to make."""
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**LANGUAGE),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[32, 32]],
    )
    return make(tf.LlavaNextForConditionalGeneration, config)


def paligemma():
    """Its language part is bidirectional on the prompt, and has a cache."""
    config = tf.PaliGemmaConfig(
        text_config=LANGUAGE | {"model_type": "gemma", "head_dim": 16},
        vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        projection_dim=32,
        image_token_id=IMAGE,
    )
    return make(tf.PaliGemmaForConditionalGeneration, config)


def embedding_gemma():
    """An encoder of text that is built of a decoder's parts."""
    kinds = ["sliding_attention", "full_attention"]
    config = LANGUAGE | {"head_dim": 16, "use_bidirectional_attention": True, "sliding_window": 8, "layer_types": kinds}
    return make(tf.Gemma3TextModel, tf.Gemma3TextConfig(**config))


def qwen3_5():
    """A hybrid: every second layer of the language part is linear attention, which leaves gaps in the indices."""
    linear = {f"linear_num_{side}_heads": 2 for side in ("key", "value")}
    linear |= {f"linear_{side}_head_dim": 16 for side in ("key", "value")}
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    kinds = ["linear_attention", "full_attention"] * 2
    vision = {"depth": 2, "num_position_embeddings": 16, "out_hidden_size": 32, "num_heads": 2, "hidden_size": 32}
    config = tf.Qwen3_5Config(
        text_config=LANGUAGE
        | linear
        | {"num_hidden_layers": 4, "head_dim": 16, "layer_types": kinds, "rope_parameters": rotary},
        vision_config=vision
        | {"intermediate_size": 48, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=IMAGE,
        vision_start_token_id=3,
        vision_end_token_id=4,
        video_token_id=96,
    )
    return make(tf.Qwen3_5ForConditionalGeneration, config)


def _prompt(pieces):
    """One row with words before and behind an image of so many pieces."""
    return torch.tensor([[1, 7, 3, *[IMAGE] * pieces, 4, 8, 9, 10, 11, 12]])


def _with_grid(prompt):
    return {
        "input_ids": prompt,
        "pixel_values": torch.randn(16, 3 * 2 * 64, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (prompt == IMAGE).long(),
    }


VISION_LANGUAGE = {
    "llava": (llava, lambda: {"input_ids": _prompt(16), "pixel_values": pixels(1)}),
    "qwen2-vl (multimodal rotary)": (qwen2_vl, lambda: _with_grid(_prompt(4))),
    "qwen3.5 (hybrid)": (qwen3_5, lambda: _with_grid(_prompt(4))),
    "smolvlm": (smolvlm, lambda: {"input_ids": _prompt(4), "pixel_values": pixels(1)[None]}),
}
"""For each, the model and what it reads: a prompt with an image in it."""
