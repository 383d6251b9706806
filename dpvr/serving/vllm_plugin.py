"""DPVR in vLLM: `vllm serve` for DPVR repositories and adapters, on vLLM's own models, kernels and weight loading.

vLLM calls `register` in each of its processes, through the entry point in pyproject.toml. Nothing here imports vLLM
before that.

    vllm serve my-dpvr-repository
    vllm serve my-dpvr-repository --hf-overrides '{"routing": "none"}'                  vanilla, on the same weights
    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"architectures": ["DpvrLlavaForConditionalGeneration"],
                                                         "dpvr_adapter": "my-adapter"}'

    plans.py          which plan a configuration names, and what is refused
    runs.py           a batch's tokens, sorted into runs of text and images
    models.py         the model: the stock one, on a twin whose deep layers run text alone
    renderer.py       prompts whose marks and pictures do not fit are refused
    image_keys.py     what deep layers read of the image: side layers, latent, keys and values
    check.py          python -m dpvr.serving.check: answers equal those of transformers
"""

ARCHITECTURES = {  # in a configuration: the class; without "Dpvr" they are vLLM's own
    "DpvrLlavaForConditionalGeneration": "dpvr.serving.models:DpvrLlavaForConditionalGeneration",
    "DpvrQwen2_5_VLForConditionalGeneration": "dpvr.serving.models:DpvrQwen2_5_VLForConditionalGeneration",
    "DpvrQwen3VLForConditionalGeneration": "dpvr.serving.models:DpvrQwen3VLForConditionalGeneration",
}


def register() -> None:
    """Tell vLLM of the models, their configuration, and the check of a server's options. May be called repeatedly."""
    from transformers import AutoConfig, AutoProcessor, LlavaProcessor
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from configuration_dpvr import DpvrLlavaConfig
    from dpvr.serving.plans import RENDERER, EngineCheck

    AutoConfig.register(DpvrLlavaConfig.model_type, DpvrLlavaConfig, exist_ok=True)
    AutoProcessor.register(DpvrLlavaConfig, LlavaProcessor, exist_ok=True)
    known = ModelRegistry.get_supported_archs()
    for name, place in ARCHITECTURES.items():
        MODELS_CONFIG_MAP[name] = EngineCheck
        if name not in known:
            ModelRegistry.register_model(name, place)
    if RENDERER not in RENDERER_REGISTRY.renderers:
        TokenizerRegistry.register(RENDERER, *TokenizerRegistry.tokenizers["hf"])
        RENDERER_REGISTRY.register(RENDERER, "dpvr.serving.renderer", "DpvrRenderer")
