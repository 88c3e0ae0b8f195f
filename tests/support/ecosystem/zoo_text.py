"""Models of transformers for text: one line each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .builders import Model, both, tokens
from .builders import of_transformers as _model

_IDS = tokens()
_TWO_SIDES = both(_IDS, tokens(name="decoder_input_ids"))
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 5, "use_cache": False}
TEXT = {
    **_TOKENS,
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
_EXPERTS = {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SEQ2SEQ = {
    **_TOKENS,
    "decoder_start_token_id": 2,
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
}
_T5 = {
    **_TOKENS,
    "decoder_start_token_id": 0,
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
}


def _classifier(family: str, heads: str, **options: Any) -> Model:
    """A classifier of sequences."""
    return _model(f"{family}ForSequenceClassification", f"{family}Config", _IDS, heads, **{**TEXT, **options})


def _decoder(family: str, **options: Any) -> Model:
    """A decoder with a classifier, whose name is ``score`` everywhere."""
    return _model(f"{family}ForSequenceClassification", f"{family}Config", _IDS, "score", **{**_DECODER, **options})


def _base(family: str, **options: Any) -> Model:
    """A decoder without a head."""
    return _model(f"{family}Model", f"{family}Config", _IDS, **{**_DECODER, **options})


_ENCODERS = [
    _classifier("Bert", "classifier"),
    _classifier("Roberta", "classifier.out_proj", max_position_embeddings=40),
    _classifier("XLMRoberta", "classifier.out_proj", max_position_embeddings=40),
    _model(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _IDS,
        "classifier",
        **{**_TOKENS, "vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    _classifier("Albert", "classifier", embedding_size=8),
    _classifier("Electra", "classifier.out_proj", embedding_size=8),
    _classifier("Deberta", "classifier", pos_att_type=["c2p", "p2c"], relative_attention=True),
    _classifier("DebertaV2", "classifier", pos_att_type=["c2p", "p2c"], relative_attention=True),
    _classifier("MPNet", "classifier.out_proj"),
    _classifier("ModernBert", "classifier", cls_token_id=1, sep_token_id=2),
    _classifier("MobileBert", "classifier", embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8),
    _classifier("SqueezeBert", "classifier", embedding_size=16, q_groups=2, k_groups=2, v_groups=2),
    _classifier("ConvBert", "classifier.out_proj", embedding_size=16, conv_kernel_size=3),
    _classifier("RemBert", "classifier", input_embedding_size=8, output_embedding_size=8),
    _classifier("RoFormer", "classifier.out_proj", embedding_size=16),
    _classifier("Nystromformer", "classifier.out_proj", num_landmarks=4, segment_means_seq_len=8),
    _classifier("FNet", "classifier"),
    # Its ranges are buffers that change in training.
    replace(_classifier("IBert", "classifier.out_proj"), owners={"per_task": "*.x_m*"}),
    _classifier("MegatronBert", "classifier"),
    _classifier("Longformer", "classifier.out_proj", attention_window=4, max_position_embeddings=40),
    _classifier("BigBird", "classifier.out_proj", attention_type="original_full"),
    _model(
        "FunnelForSequenceClassification",
        "FunnelConfig",
        _IDS,
        "classifier.linear_out",
        **{**_TOKENS, "vocab_size": 64, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32},
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    _model(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        _IDS,
        "logits_proj",
        **{**_TOKENS, "vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    ),
    _model(
        "PerceiverForSequenceClassification",
        "PerceiverConfig",
        tokens(name="inputs"),
        "perceiver.decoder.decoder.final_layer",
        **{**_TOKENS, "vocab_size": 64, "d_model": 16, "d_latents": 16, "num_latents": 4},
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        max_position_embeddings=32,
    ),
    _model("BertForMaskedLM", "BertConfig", _IDS, **TEXT),
]

_DECODERS = [
    _model(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        _IDS,
        "score",
        **{**_TOKENS, "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    _model(
        "GPT2LMHeadModel",
        "GPT2Config",
        _IDS,
        **{**_TOKENS, "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    _model(
        "OpenAIGPTForSequenceClassification",
        "OpenAIGPTConfig",
        _IDS,
        "score",
        **{**_TOKENS, "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    _model(
        "CTRLForSequenceClassification",
        "CTRLConfig",
        _IDS,
        "classifier",
        **{**_TOKENS, "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "dff": 32},
    ),
    _model(
        "GPTNeoForSequenceClassification",
        "GPTNeoConfig",
        _IDS,
        "score",
        **{**_TOKENS, "vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32},
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
        window_size=4,
    ),
    _decoder("GPTNeoX"),
    _model(
        "GPTJForSequenceClassification",
        "GPTJConfig",
        _IDS,
        "score",
        **{**_TOKENS, "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "rotary_dim": 4},
    ),
    _model(
        "OPTForSequenceClassification",
        "OPTConfig",
        _IDS,
        "score",
        **{**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 8},
    ),
    _model(
        "BloomForSequenceClassification",
        "BloomConfig",
        _IDS,
        "score",
        **{**_TOKENS, "vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    _model(
        "MptForSequenceClassification",
        "MptConfig",
        _IDS,
        "score",
        **{**_TOKENS, "vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32},
    ),
    _decoder("Llama"),
    _decoder("Mistral", sliding_window=4),
    _decoder("Mixtral", num_local_experts=4),
    _decoder("Qwen2"),
    _decoder("Qwen3"),
    _model(
        "Qwen2MoeForSequenceClassification",
        "Qwen2MoeConfig",
        _IDS,
        "score",
        **{**_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    _model("Qwen3MoeForSequenceClassification", "Qwen3MoeConfig", _IDS, "score", **_EXPERTS),
    _model(
        "GptOssForSequenceClassification",
        "GptOssConfig",
        _IDS,
        "score",
        **{**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    _model("OlmoeModel", "OlmoeConfig", _IDS, **{**_EXPERTS, "num_key_value_heads": 2}),
    _decoder("Gemma"),
    _decoder("Gemma2", sliding_window=4),
    _model("Gemma3TextForSequenceClassification", "Gemma3TextConfig", _IDS, "score", **_DECODER, sliding_window=4),
    _decoder("Phi", num_key_value_heads=2),
    _decoder("Phi3"),
    _classifier("Falcon", "score"),
    _decoder("StableLm"),
    _decoder("Persimmon"),
    _decoder("Starcoder2"),
    _decoder("Nemotron"),
    _decoder("Glm"),
    _decoder("SmolLM3"),
    _base("Olmo"),
    _base("Olmo2"),
    _base("Cohere"),
    _base("Granite"),
    _base("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    _model(
        "DeepseekV3Model",
        "DeepseekV3Config",
        _IDS,
        **{**TEXT, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2},
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
        num_key_value_heads=2,
    ),
    _model("XGLMModel", "XGLMConfig", _IDS, **_TOKENS, vocab_size=64, d_model=16, ffn_dim=32, num_layers=2,
           attention_heads=2, max_position_embeddings=32),
    _classifier("BioGpt", "score"),
    _model("CodeGenModel", "CodeGenConfig", _IDS, **_TOKENS, vocab_size=64, n_embd=32, n_layer=2, n_head=4,
           n_positions=32, n_ctx=32, rotary_dim=4),
    _model("MambaModel", "MambaConfig", _IDS, vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2,
           time_step_rank=4, use_cache=False),
    _model("Mamba2Model", "Mamba2Config", _IDS, vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2,
           num_heads=4, head_dim=8, n_groups=2, chunk_size=4, use_cache=False),
    _model("FalconMambaModel", "FalconMambaConfig", _IDS, vocab_size=64, hidden_size=16, state_size=4,
           num_hidden_layers=2, time_step_rank=4, use_cache=False),
    _model("RwkvModel", "RwkvConfig", _IDS, vocab_size=64, hidden_size=16, attention_hidden_size=16,
           num_hidden_layers=2, context_length=32, use_cache=False, rescale_every=0),  # else it divides its weights
    _model("JambaForSequenceClassification", "JambaConfig", _IDS, "score", **{**_DECODER, "num_experts": 4},
           mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1,
           expert_layer_period=2, expert_layer_offset=1),
    _model("RecurrentGemmaModel", "RecurrentGemmaConfig", _IDS, **{**_DECODER, "num_hidden_layers": 3},
           lru_width=16, attention_window_size=8),
]  # fmt: skip

_ENCODER_DECODERS = [
    _model("T5ForSequenceClassification", "T5Config", _IDS, "classification_head.out_proj", **_T5),
    _model("MT5ForSequenceClassification", "MT5Config", _IDS, "classification_head.out_proj", **_T5),
    _model("UMT5ForSequenceClassification", "UMT5Config", _IDS, "classification_head.out_proj", **_T5),
    _model("T5ForConditionalGeneration", "T5Config", _TWO_SIDES, **_T5),
    _model("BartForSequenceClassification", "BartConfig", _IDS, "classification_head.out_proj", **SEQ2SEQ),
    _model("MBartForSequenceClassification", "MBartConfig", _IDS, "classification_head.out_proj", **SEQ2SEQ),
    _model("BartForConditionalGeneration", "BartConfig", _TWO_SIDES, **SEQ2SEQ),
    _model("PegasusModel", "PegasusConfig", _TWO_SIDES, **SEQ2SEQ),
    _model("MarianModel", "MarianConfig", _TWO_SIDES, **{**SEQ2SEQ, "decoder_vocab_size": 64}),
    _model("M2M100Model", "M2M100Config", _TWO_SIDES, **SEQ2SEQ),
    _model("BlenderbotModel", "BlenderbotConfig", _TWO_SIDES, **SEQ2SEQ),
    _model("LEDModel", "LEDConfig", _TWO_SIDES, **SEQ2SEQ, attention_window=4, max_encoder_position_embeddings=32,
           max_decoder_position_embeddings=32),
    _model("ProphetNetModel", "ProphetNetConfig", _TWO_SIDES, **_TOKENS, decoder_start_token_id=1, vocab_size=64,
           hidden_size=16, encoder_ffn_dim=32, decoder_ffn_dim=32, num_encoder_layers=1, num_decoder_layers=1,
           num_encoder_attention_heads=2, num_decoder_attention_heads=2, max_position_embeddings=32),
]  # fmt: skip

MODELS = [*_ENCODERS, *_DECODERS, *_ENCODER_DECODERS]
