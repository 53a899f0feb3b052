"Hugging Face transformers, from small configurations and without weights."

from __future__ import annotations

import torch
import transformers as hf

from .architecture import Architecture, Built
from .inputs import crops, noise, padding, tokens

TEXT = dict(vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
VISION = dict(
    image_size=64, patch_size=8, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
)
SPECIAL = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def text():
    return dict(input_ids=tokens(), attention_mask=(~padding()).long())


def seq2seq():
    return text() | dict(decoder_input_ids=tokens(length=16, seed=1))


def images():
    return dict(pixel_values=crops(side=64))


def waves():
    return dict(input_values=noise(2, 8000).cumsum(1) / 50)


def clip_config():
    towers = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    return hf.CLIPConfig(
        text_config=towers | dict(vocab_size=100) | SPECIAL,
        vision_config=towers | dict(image_size=64, patch_size=8),
        projection_dim=32,
    )


MODELS = {  # name: (class, configuration, batch)
    "BERT": ("BertForMaskedLM", lambda: hf.BertConfig(**TEXT), text),
    "BERT classifier": ("BertForSequenceClassification", lambda: hf.BertConfig(**TEXT), text),
    "RoBERTa": ("RobertaForMaskedLM", lambda: hf.RobertaConfig(**TEXT | SPECIAL), text),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        lambda: hf.DistilBertConfig(vocab_size=100, dim=64, n_layers=3, n_heads=4, hidden_dim=128),
        text,
    ),
    "ALBERT": ("AlbertForMaskedLM", lambda: hf.AlbertConfig(embedding_size=32, **TEXT), text),
    "ELECTRA": ("ElectraForPreTraining", lambda: hf.ElectraConfig(embedding_size=32, **TEXT), text),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification",
        lambda: hf.DebertaV2Config(relative_attention=True, pos_att_type=["c2p", "p2c"], **TEXT),
        text,
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        lambda: hf.GPT2Config(vocab_size=100, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
        text,
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", lambda: hf.GPTNeoXConfig(**TEXT | SPECIAL), text),
    "Llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(num_key_value_heads=2, **TEXT), text),
    "Gemma-2": ("Gemma2ForCausalLM", lambda: hf.Gemma2Config(num_key_value_heads=2, head_dim=16, **TEXT), text),
    "Mixtral": (
        "MixtralForCausalLM",
        lambda: hf.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **TEXT),
        text,
    ),
    "Mamba": (
        "MambaForCausalLM",
        lambda: hf.MambaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=3),
        lambda: dict(input_ids=tokens()),
    ),
    "T5": (
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
        seq2seq,
    ),
    "BART": (
        "BartForConditionalGeneration",
        lambda: hf.BartConfig(
            vocab_size=100,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            **SPECIAL,
        ),
        seq2seq,
    ),
    "ViT": ("ViTForImageClassification", lambda: hf.ViTConfig(**VISION), images),
    "BEiT": ("BeitForImageClassification", lambda: hf.BeitConfig(**VISION), images),
    "DINOv2": ("Dinov2ForImageClassification", lambda: hf.Dinov2Config(**VISION), images),
    "Swin": (
        "SwinForImageClassification",
        lambda: hf.SwinConfig(
            image_size=64, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        images,
    ),
    "SegFormer": ("SegformerForImageClassification", lambda: hf.SegformerConfig(), images),
    "CLIP": ("CLIPModel", clip_config, lambda: images() | text()),
    "Wav2Vec2": (
        "Wav2Vec2ForCTC",
        lambda: hf.Wav2Vec2Config(
            conv_dim=(32,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            **TEXT | dict(vocab_size=32),
        ),
        waves,
    ),
    "Wav2Vec2, stable": (
        "Wav2Vec2ForCTC",
        lambda: hf.Wav2Vec2Config(
            conv_dim=(32,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            do_stable_layer_norm=True,
            feat_extract_norm="layer",
            conv_bias=True,
            **TEXT | dict(vocab_size=32),
        ),
        waves,
    ),
    "HuBERT": (
        "HubertForCTC",
        lambda: hf.HubertConfig(
            conv_dim=(32,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            **TEXT | dict(vocab_size=32),
        ),
        waves,
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        lambda: hf.WhisperConfig(
            vocab_size=100,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            num_mel_bins=20,
            max_source_positions=50,
            decoder_start_token_id=1,
            **SPECIAL,
        ),
        lambda: dict(input_features=noise(2, 20, 100), decoder_input_ids=tokens(2, 16)),
    ),
}


def architectures():
    for name in MODELS:
        yield Architecture("Hugging Face", name, lambda name=name: build(name))


def build(name):
    kind, config, batch = MODELS[name]
    torch.manual_seed(0)
    return Built(getattr(hf, kind)(config()), batch(), kind)
