"""Which model families the runtime runs: the operator has no transformers and must know before it makes a pod.

A test asks the runtime about every family of the installed transformers and holds these tables against its answers.
"""

import difflib

TRANSFORMERS = "5.23"
_SERVED = """
    afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 dots1 dots3_note dots3_note_text ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4
    gemma4_text glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2 inkling2_text inkling_mm_model inkling_text
    jamba kimi_linear kolibri1 laguna lfm2_moe mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl
    minimax_m3_vl_text mistral4 mistral_large4 mixtral muse_spark nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe
    qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp qwen4_exp_text solar_open
    step3p7 zaya
"""
SERVED = frozenset(_SERVED.split())
"""Model types of checkpoints that run."""

_NEEDS_CHECKPOINT = """
    aria axk1 axk2 bailing_hybrid deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note dots3_note_text
    ernie4_5_vl_moe flint gemma4 gemma4_text glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v4 inkling2
    inkling_mm_model jamba kimi_linear lfm2_moe minimax_m3_vl mistral4 mistral_large4 muse_spark nemotron_h
    qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp qwen4_exp_text step3p7
"""
NEEDS_CHECKPOINT = frozenset(_NEEDS_CHECKPOINT.split())
"""Of those, the ones that the numbers of a shape do not describe: composite models, latent attention, mixed layers."""

UNREPLAYABLE = frozenset({"unlimited_ocr"})
"""Their attention treats a prompt otherwise than the tokens generated after it."""


def why_refused(family: str, *, from_shape: bool = False) -> str | None:
    """Why a model of this type cannot run, None if it can.

    >>> why_refused("llama")
    'model family llama is not supported: transformers 5.23 has no text model with an expert-parallel plan for it'
    >>> why_refused("mixtral")
    """
    if family in UNREPLAYABLE:
        why = "its attention treats a prompt otherwise than the tokens generated after it: no request could be replayed"
    elif family not in SERVED:
        why = f"transformers {TRANSFORMERS} has no text model with an expert-parallel plan for it"
        close = difflib.get_close_matches(family, sorted(SERVED), n=1, cutoff=0.8)
        why += f"; did you mean {close[0]}?" if close else ""
    elif from_shape and family in NEEDS_CHECKPOINT:
        why = "it needs more numbers than a shape has"
    else:
        return None
    return f"model family {family} is not supported: {why}"
