"""Models of transformers for speech, pictures and time series: one line each."""

from __future__ import annotations

import torch

from .builders import both, constant, image, normal, tokens
from .builders import of_transformers as _model
from .zoo_text import SEQ2SEQ as _SEQ2SEQ
from .zoo_text import TEXT as _TEXT

_IDS = tokens()
_PIXELS = image(16, name="pixel_values")
_PIXELS32 = image(32, name="pixel_values")
_SPEECH = {
    "num_labels": 5,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_VISION = {
    "num_labels": 5,
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_WHISPER = {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
_MEL = normal(2, 8, 16, name="input_features")
_SOUND = normal(2, 400, name="input_values")

_SPEECHES = [
    _model("WhisperForAudioClassification", "WhisperConfig", _MEL, "classifier", **_WHISPER, classifier_proj_size=8),
    _model("WhisperForConditionalGeneration", "WhisperConfig", both(_MEL, tokens(name="decoder_input_ids")),
           **_WHISPER),
    _model("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _SOUND, "classifier", **_SPEECH),
    _model("HubertForSequenceClassification", "HubertConfig", _SOUND, "classifier", **_SPEECH),
    _model("WavLMForSequenceClassification", "WavLMConfig", _SOUND, "classifier", **_SPEECH),
    _model("UniSpeechForSequenceClassification", "UniSpeechConfig", _SOUND, "classifier", **_SPEECH),
    _model("UniSpeechSatForSequenceClassification", "UniSpeechSatConfig", _SOUND, "classifier", **_SPEECH),
    _model("SEWForSequenceClassification", "SEWConfig", _SOUND, "classifier", **_SPEECH, squeeze_factor=2),
    _model("Data2VecAudioForSequenceClassification", "Data2VecAudioConfig", _SOUND, "classifier", **_SPEECH),
    _model("ASTForAudioClassification", "ASTConfig", normal(2, 32, 16, name="input_values"), "classifier.dense",
           **{**_VISION, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}),
]  # fmt: skip

_SWIN = {"num_labels": 5, "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
         "window_size": 4}  # fmt: skip
_STAGES = {"num_labels": 5, "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}

_PICTURES = [
    _model("ViTForImageClassification", "ViTConfig", _PIXELS, "classifier", **_VISION),
    _model("DeiTForImageClassification", "DeiTConfig", _PIXELS, "classifier", **_VISION),
    _model("BeitForImageClassification", "BeitConfig", _PIXELS, "classifier", **_VISION,
           use_relative_position_bias=True),
    _model("Data2VecVisionForImageClassification", "Data2VecVisionConfig", _PIXELS, "classifier", **_VISION),
    _model("Dinov2ForImageClassification", "Dinov2Config", _PIXELS, "classifier", **_VISION, mlp_ratio=2),
    _model("IJepaForImageClassification", "IJepaConfig", _PIXELS, "classifier", **_VISION),
    _model("ViTMSNForImageClassification", "ViTMSNConfig", _PIXELS, "classifier", **_VISION),
    _model("SwinForImageClassification", "SwinConfig", _PIXELS32, "classifier", **_SWIN),
    _model("Swinv2ForImageClassification", "Swinv2Config", _PIXELS32, "classifier", **_SWIN),
    _model("ConvNextForImageClassification", "ConvNextConfig", _PIXELS32, "classifier", **_STAGES, num_stages=2),
    _model("ConvNextV2ForImageClassification", "ConvNextV2Config", _PIXELS32, "classifier", **_STAGES, num_stages=2),
    _model("ResNetForImageClassification", "ResNetConfig", _PIXELS32, "classifier.1", **_STAGES, layer_type="basic"),
    _model("RegNetForImageClassification", "RegNetConfig", _PIXELS32, "classifier.1", **_STAGES, groups_width=8),
    _model("BitForImageClassification", "BitConfig", _PIXELS32, "classifier.1", **_STAGES, num_groups=4),
    _model("FocalNetForImageClassification", "FocalNetConfig", _PIXELS32, "classifier", num_labels=5, image_size=32,
           embed_dim=8, hidden_sizes=[8, 16], depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3]),
    _model("MobileNetV1ForImageClassification", "MobileNetV1Config", _PIXELS32, "classifier", num_labels=5,
           depth_multiplier=0.25, image_size=32),
    _model("MobileNetV2ForImageClassification", "MobileNetV2Config", _PIXELS32, "classifier", num_labels=5,
           depth_multiplier=0.25, image_size=32),
    _model("MobileViTForImageClassification", "MobileViTConfig", image(64, name="pixel_values"), "classifier",
           num_labels=5, image_size=64, hidden_sizes=[16, 16, 16],
           neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 16],
           num_attention_heads=2),
    _model("SegformerForImageClassification", "SegformerConfig", _PIXELS32, "classifier", num_labels=5,
           num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
           strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16),
    _model("SegformerForSemanticSegmentation", "SegformerConfig", _PIXELS32, "decode_head.classifier", num_labels=5,
           num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
           strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16),
    _model("PvtForImageClassification", "PvtConfig", _PIXELS32, "classifier", num_labels=5, image_size=32,
           num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1], hidden_sizes=[8, 16],
           patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    _model("PvtV2ForImageClassification", "PvtV2Config", _PIXELS32, "classifier", num_labels=5, image_size=32,
           num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
           strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    _model("CvtForImageClassification", "CvtConfig", _PIXELS32, "classifier", num_labels=5, embed_dim=[8, 16],
           depth=[1, 2], num_heads=[1, 2], patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1],
           mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0],
           qkv_bias=[True, True], cls_token=[False, True], qkv_projection_method=["dw_bn"] * 2,
           kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1]),
    _model("LevitForImageClassification", "LevitConfig", image(64, name="pixel_values"), "classifier.linear",
           num_labels=5, image_size=64, hidden_sizes=[16, 16, 16],
           num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4]),
    _model("PoolFormerForImageClassification", "PoolFormerConfig", _PIXELS32, "classifier", num_labels=5,
           num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
           padding=[2, 1], mlp_ratio=2.0),
    _model("HieraForImageClassification", "HieraConfig", _PIXELS32, "classifier", num_labels=5, image_size=[32, 32],
           embed_dim=8, depths=[1, 1], num_heads=[1, 2], patch_stride=[4, 4], masked_unit_size=[4, 4],
           masked_unit_attention=[True, False], num_query_pool=1, query_stride=[2, 2]),
    _model("ViTMAEModel", "ViTMAEConfig", both(_PIXELS, lambda: {"noise": torch.linspace(0, 1, 32).view(2, 16)}),
           **_VISION, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
           decoder_intermediate_size=32),
    _model("YolosModel", "YolosConfig", _PIXELS, **{**_VISION, "image_size": [16, 16], "num_detection_tokens": 4}),
    _model("VideoMAEForVideoClassification", "VideoMAEConfig", normal(2, 4, 3, 16, 16, name="pixel_values"),
           "classifier", **_VISION, num_frames=4),
    _model("TimesformerForVideoClassification", "TimesformerConfig", normal(2, 2, 3, 16, 16, name="pixel_values"),
           "classifier", **_VISION, num_frames=2),
]  # fmt: skip

_TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_TEXT_TOWER = {**_TOWER, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
_VISION_TOWER = {**_TOWER, "image_size": 16, "patch_size": 4}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1,
           "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "use_cache": False}  # fmt: skip
_PAST = both(
    normal(2, 10, name="past_values"),
    normal(2, 10, 1, name="past_time_features"),
    constant(past_observed_mask=torch.ones(2, 10)),
    normal(2, 4, name="future_values"),
    normal(2, 4, 1, name="future_time_features"),
)

_OTHERS = [
    _model("CLIPModel", "CLIPConfig", both(_IDS, _PIXELS), text_config=_TEXT_TOWER, vision_config=_VISION_TOWER,
           projection_dim=8),
    _model("CLIPForImageClassification", "CLIPConfig", _PIXELS, "classifier", text_config=_TEXT_TOWER,
           vision_config=_VISION_TOWER, num_labels=5),
    _model("SiglipModel", "SiglipConfig", both(_IDS, _PIXELS), text_config=_TEXT_TOWER, vision_config=_VISION_TOWER),
    _model("SiglipForImageClassification", "SiglipConfig", _PIXELS, "classifier", text_config=_TEXT_TOWER,
           vision_config=_VISION_TOWER, num_labels=5),
    _model("ViltModel", "ViltConfig", both(_IDS, _PIXELS), **{**_TEXT, **_VISION}, max_image_length=-1),
    _model("TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", _PAST, **_SERIES),
    _model("InformerModel", "InformerConfig", _PAST, **_SERIES),
    _model("AutoformerModel", "AutoformerConfig", _PAST, **_SERIES, label_length=4, moving_average=3, input_size=1),
    _model("PatchTSTForClassification", "PatchTSTConfig", normal(2, 16, 3, name="past_values"), "head.linear",
           num_input_channels=3, context_length=16, patch_length=4, patch_stride=4, num_targets=5, d_model=16,
           num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, use_cls_token=True),
    _model("PatchTSMixerForTimeSeriesClassification", "PatchTSMixerConfig", normal(2, 16, 3, name="past_values"),
           "head.projection", num_input_channels=3, context_length=16, patch_length=4, patch_stride=4, num_targets=5,
           d_model=16, num_layers=1),
    _model("DecisionTransformerModel", "DecisionTransformerConfig", both(
        normal(2, 4, 3, name="states"), normal(2, 4, 2, name="actions"), normal(2, 4, 1, name="rewards"),
        normal(2, 4, 1, name="returns_to_go"), constant(timesteps=torch.arange(4).expand(2, 4).clone()),
        constant(attention_mask=torch.ones(2, 4, dtype=torch.long))),
        state_dim=3, act_dim=2, hidden_size=16, max_ep_len=8, n_layer=1, n_head=2, n_positions=32),
]  # fmt: skip

MODELS = [*_SPEECHES, *_PICTURES, *_OTHERS]
