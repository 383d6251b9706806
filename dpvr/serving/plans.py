"""Which layer plan a server runs, from its configuration, and what is refused before any weight is loaded.

    DPVR repository      config.json has the fields of DpvrLlavaConfig; --hf-overrides may change them
    base and adapter     --hf-overrides names `dpvr_adapter`, a folder or Hub repository with adapter_config.json

Paged attention gives a query all keys up to its slot, without gaps. So a plan can be served if each slot of each layer
holds a key: if all layers past the split read the image, and all of its tokens.
"""

from typing import Any, NamedTuple

from transformers import PretrainedConfig

from configuration_dpvr import CONTEXT, RESET, LayerPlan

ADAPTER = "dpvr_adapter"  # the field of --hf-overrides that names an adapter
RENDERER = "dpvr"  # vLLM's name for what turns prompts into tokens, a "tokenizer mode"


class Served(NamedTuple):
    """What a server runs.

    Attributes:
        plan: what every decoder layer does.
        num_side_layers: decoder layers that image states run through at the split.
        latent_rank: the width of the latent that deep layers read; None: they read the side layers' output.
        source: the adapter's, or the base's if the repository holds a side branch alone; None: all is in one place.
    """

    plan: LayerPlan
    num_side_layers: int = 0
    latent_rank: int | None = None
    source: str | None = None


def served(config: PretrainedConfig) -> Served:
    """What a configuration says to serve.

    Args:
        config: of the whole vision-language model, with the overrides applied.

    Raises:
        ValueError: for a plan that cannot be served, or an adapter that does not fit.
    """
    if vars(config).get(ADAPTER) is not None:
        method, source = _adapter(config), vars(config)[ADAPTER]
        plan = method.plan_for(config)
    elif "latent_rank" in vars(config):
        method, source, plan = config, config.base_model_name_or_path, config.layer_plan()
    else:
        raise ValueError(
            f"This {config.model_type!r} model is no DPVR repository, and no adapter is named: add "
            f'"{ADAPTER}": "<folder or Hub id of a DPVR adapter>" to --hf-overrides, or leave the architecture out.'
        )
    check_plan(plan)
    if plan.is_vanilla:
        return Served(plan, source=source)
    if plan.latent_stride:
        return Served(plan, method.latent_side_layers, method.latent_rank, source)
    return Served(plan, method.num_side_layers, None, source)


def _adapter(config: PretrainedConfig) -> Any:
    from adapter_dpvr import DpvrConfig

    method = DpvrConfig.from_pretrained(vars(config)[ADAPTER])
    if method.side_branch_mlp != "copy":
        raise ValueError(
            f"The adapter has side_branch_mlp={method.side_branch_mlp!r}, and the plugin builds side layers as copies "
            "of the decoder's: serve it with `transformers serve`."
        )
    return method


def check_plan(plan: LayerPlan) -> None:
    """Raise ValueError, with the reason, for a plan that cannot be served."""
    deep = plan.modes[plan.split_layer :]
    if blind := [plan.split_layer + at for at, mode in enumerate(deep) if mode not in (CONTEXT, RESET)]:
        raise ValueError(
            f"The plan {plan} cannot be served by vLLM: in layer {blind[0]} text must not see the image, or image "
            "tokens run on, and paged attention reads every slot of the cache. Choose a routing in which all layers "
            "past the split read the image, latent or kv_substitution, or serve it with `transformers serve`."
        )
    if plan.latent_stride > 1:
        raise ValueError(
            f"latent_stride is {plan.latent_stride}: slots of image tokens that are not read would hold no keys, and "
            "paged attention reads every slot of the cache. Fit a latent with stride 1."
        )


class EngineCheck:
    """What vLLM calls with a server's options before it loads a DPVR model."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Have prompts checked: renderer.py. vLLM itself chooses renderers by mode, too, for some models."""
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = RENDERER

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse options under which only some tokens of a batch cannot run in a layer; turn off full CUDA graphs.

        Raises:
            ValueError: for such an option, and for a plan that cannot be served.
        """
        wanted = served(vllm_config.model_config.hf_config)
        if wanted.plan.is_vanilla:
            return
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        refused = {
            "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
            "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
            "--enable-dbo": parallel.enable_dbo,
            "--enable-lora": vllm_config.lora_config is not None,
            "--speculative-config": vllm_config.speculative_config is not None,
            "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
            "--enable-prompt-embeds": vllm_config.model_config.enable_prompt_embeds,  # these hide which are images
            "--quantization": vllm_config.model_config.quantization is not None,
            "--kv-cache-dtype": wanted.num_side_layers > 0 and cache.cache_dtype.startswith("fp8"),
        }
        if options := [option for option, found in refused.items() if found]:
            raise ValueError(
                f"{options[0]} is not supported under a DPVR routing: leave it out, or serve the model as vanilla "
                'with --hf-overrides \'{"routing": "none"}\'.'
            )
        from vllm.config import CUDAGraphMode

        graphs = vllm_config.compilation_config
        if graphs.cudagraph_mode != CUDAGraphMode.NONE:  # None: vLLM would choose full graphs later
            graphs.cudagraph_mode = CUDAGraphMode.PIECEWISE


def check_graphs(vllm_config: Any) -> None:
    """Refuse CUDA graphs of a whole step: replayed, they would run image tokens through all layers.

    Graphs of pieces are kept within the compiled decoder, which batches with image tokens do not call. That is the
    mode that `EngineCheck` sets; this looks at what vLLM has made of it.

    Args:
        vllm_config: as it is when the model is built.

    Raises:
        ValueError: for full graphs, and for those that are captured around the model and broken at attention.
    """
    from vllm import envs

    mode = vllm_config.compilation_config.cudagraph_mode
    if mode.has_full_cudagraphs() or (mode.has_piecewise_cudagraphs() and envs.VLLM_USE_BREAKABLE_CUDAGRAPH):
        raise ValueError(
            f"CUDA graphs of a whole step are on (cudagraph_mode {mode.name}, VLLM_USE_BREAKABLE_CUDAGRAPH "
            f"{int(envs.VLLM_USE_BREAKABLE_CUDAGRAPH)}), and a graph does not ask which tokens are images: leave "
            "--compilation-config and VLLM_USE_BREAKABLE_CUDAGRAPH out, or add --enforce-eager."
        )
