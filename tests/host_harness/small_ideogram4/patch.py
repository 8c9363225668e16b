"""The host takes some dimensions of a model from its own classes, not from the file: give it the small models'.

Kept apart from `host_harness.small_models` because the host imports this folder on its own.
"""

IDEOGRAM4 = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "intermediate_size": 512,
    "adaln_dim": 256,
    "llm_features_dim": 832,
    "rope_theta": 5000000,
    "mrope_section": [24, 20, 20],
    "norm_eps": 1e-5,
}
LUMINA2 = {  # Z-Image's settings, which the host gives to models of width 3840 only
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_refiner_layers": 1,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


def patch() -> None:
    """From now on the host builds Ideogram 4, Lumina 2 and Ideogram 4's text encoder in the small sizes only."""
    import comfy.sd
    import comfy.supported_models
    import comfy.text_encoders.ideogram4

    comfy.supported_models.Ideogram4.unet_extra_config = IDEOGRAM4
    comfy.supported_models.Lumina2.unet_extra_config = LUMINA2
    comfy.text_encoders.ideogram4.QWEN3VL_8B_CONFIG.update(TEXT_ENCODER)

    detect = comfy.sd.detect_te_model
    if getattr(detect, "small_models", False):
        return

    def detect_small(state_dict):
        norm = state_dict.get("model.layers.35.input_layernorm.weight")
        if norm is not None and norm.shape[0] == TEXT_ENCODER["hidden_size"]:
            return comfy.sd.TEModel.QWEN3_8B
        return detect(state_dict)

    detect_small.small_models = True
    comfy.sd.detect_te_model = detect_small
