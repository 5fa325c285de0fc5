"""What the API takes and gives, as pydantic models: the OpenAPI document is made of them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxsd.run.request import MAX_SEED

STRICT = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False)

Prompt = Annotated[str, Field(max_length=4000)]
Name = Annotated[str, Field(max_length=128)]
Side = Annotated[int, Field(ge=8, le=16384, multiple_of=8)]
Base64 = Annotated[str, Field(
    description='PNG, JPEG or WebP as base64, or a data: URL; addresses and paths are not read.')]
Nothing = Annotated[list[Any], Field(max_length=0)]
NoScripts = Annotated[dict[str, Any], Field(max_length=0)]
No = Literal[False]
Zero = Annotated[float, Field(ge=0, le=0)]
Other = Annotated[int, Field(ge=-1, le=16384)]  # a side of another picture; up to 0: of none


class Neutral(BaseModel):
    """What A1111 has and this server has not: the types allow what is as good as nothing."""

    model_config = STRICT

    styles: list[Literal['', 'None']] | None = None
    script_name: Literal[''] | None = None
    script_args: Nothing | None = None
    comments: NoScripts | None = None
    infotext: Literal[''] | None = None
    save_images: No | None = False  # nothing is ever written on the server
    restore_faces: No | None = None
    disable_extra_networks: No | None = None
    s_min_uncond: Zero | None = None
    token_merging_ratio: Zero | None = None
    token_merging_ratio_hr: Zero | None = None


class ControlUnit(BaseModel):
    """One ControlNet, as sd-webui-controlnet takes it; null is as good as absent."""

    model_config = STRICT

    enabled: bool | None = True
    model: Name | None = None
    image: Base64 | dict[str, Base64 | None] | None = None
    input_image: Base64 | None = None
    module: Name | None = 'none'
    weight: float | None = 1.0
    guidance_start: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    guidance_end: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    control_mode: int | Name | None = 0
    union_control_type: Name | None = 'Unknown'
    resize_mode: int | Name | None = 1
    pixel_perfect: bool | None = False
    processor_res: Annotated[int, Field(ge=-1, le=2048)] | None = 512
    threshold_a: float | None = None
    threshold_b: float | None = None
    hr_option: Literal['Both', 'HiResFixOption.BOTH'] | None = 'Both'
    mask: Literal[''] | None = None
    mask_image: Literal[''] | None = None

    # Nothing that changes a picture:
    low_vram: bool | None = None
    lowvram: bool | None = None
    save_detected_map: bool | None = None


class DetectBody(BaseModel):
    """POST /controlnet/detect."""

    model_config = STRICT

    controlnet_module: Name = 'none'
    controlnet_input_images: Annotated[list[Base64], Field(max_length=16)] | None = None
    controlnet_images: Annotated[list[Base64], Field(max_length=16)] | None = None  # webuiapi's
    controlnet_processor_res: Annotated[int, Field(ge=-1, le=2048)] | None = 512
    controlnet_threshold_a: float | None = None
    controlnet_threshold_b: float | None = None


class Extras(BaseModel):
    """What is common to both of extra-*: how pictures are enlarged."""

    model_config = STRICT

    resize_mode: Literal[0, 1] | None = 0  # 0: by upscaling_resize, 1: to a size
    upscaling_resize: Annotated[float, Field(ge=0.1, le=16)] | None = 2.0
    upscaling_resize_w: Annotated[int, Field(ge=1, le=16384)] | None = 512
    upscaling_resize_h: Annotated[int, Field(ge=1, le=16384)] | None = 512
    upscaling_crop: bool | None = True
    upscaler_1: Name | None = 'None'
    upscaler_2: Name | None = 'None'
    extras_upscaler_2_visibility: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    gfpgan_visibility: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    codeformer_visibility: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    codeformer_weight: Annotated[float, Field(ge=0, le=1)] | None = 0.0

    # Nothing that changes a picture:
    upscale_first: bool | None = None
    show_extras_results: bool | None = None


class ExtraSingle(Extras):
    """POST /sdapi/v1/extra-single-image."""

    image: Base64


class FileData(BaseModel):
    """A picture of ExtraBatch; the name is for the client."""

    model_config = STRICT

    data: Base64
    name: Name | None = None


class ExtraBatch(Extras):
    """POST /sdapi/v1/extra-batch-images."""

    imageList: Annotated[list[FileData], Field(min_length=1, max_length=16)]


class Script(BaseModel):
    """What a script is given."""

    model_config = STRICT
    args: Annotated[list[Any], Field(max_length=64)] = []


class Body(Neutral):
    """What txt2img and img2img take; null is as good as absent."""

    prompt: Prompt | None = ''
    negative_prompt: Prompt | None = ''
    seed: Annotated[int, Field(ge=-2**63, le=MAX_SEED)] | None = -1
    subseed: Annotated[int, Field(ge=-2**63, le=MAX_SEED)] | None = -1
    subseed_strength: Annotated[float, Field(ge=0, le=1)] | None = 0
    seed_resize_from_h: Other | None = -1
    seed_resize_from_w: Other | None = -1
    tiling: bool | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    cfg_scale: float | None = None
    width: Side | None = None
    height: Side | None = None
    sampler_name: Name | None = None
    sampler_index: Name | None = None
    scheduler: Name | None = None
    eta: Annotated[float, Field(ge=0)] | None = None
    s_churn: Annotated[float, Field(ge=0)] | None = None
    s_tmin: Annotated[float, Field(ge=0)] | None = None
    s_tmax: Annotated[float, Field(ge=0)] | None = None
    s_noise: Annotated[float, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = 1
    n_iter: Annotated[int, Field(ge=1)] | None = 1
    override_settings: dict[Name, bool | int | float | Name | None] | None = None
    refiner_checkpoint: Name | None = None
    refiner_switch_at: Annotated[float, Field(ge=0, le=1)] | None = None
    send_images: bool | None = True
    force_task_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    alwayson_scripts: dict[Name, Script] | None = None  # {'controlnet': {'args': [ControlUnit]}}

    # Without a meaning here:
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    override_settings_restore_afterwards: bool | None = None


def whole(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema without references, to stand anywhere in an OpenAPI document."""
    schema = model.model_json_schema()
    parts = schema.pop('$defs', {})

    def resolved(node):
        if isinstance(node, list):
            return [resolved(each) for each in node]
        if not isinstance(node, dict):
            return node
        if '$ref' in node:
            return resolved(parts[node['$ref'].rpartition('/')[2]])
        return {key: resolved(value) for key, value in node.items()}

    return resolved(schema)


class Txt2Img(Body):
    """POST /sdapi/v1/txt2img."""

    enable_hr: bool | None = None
    denoising_strength: float | None = None  # this and the next belong to enable_hr
    hr_scale: float | None = None
    hr_upscaler: Name | None = None
    hr_second_pass_steps: int | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_checkpoint_name: Name | None = None
    hr_sampler_name: Name | None = None
    hr_scheduler: Name | None = None
    hr_prompt: Prompt | None = None
    hr_negative_prompt: Prompt | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    firstpass_image: None = None


class Img2Img(Body):
    """POST /sdapi/v1/img2img."""

    init_images: Annotated[list[Base64], Field(min_length=1, max_length=1)]
    mask: Base64 | None = None
    mask_blur: Annotated[float, Field(ge=0, le=256)] | None = None
    mask_blur_x: Annotated[float, Field(ge=0, le=256)] | None = None
    mask_blur_y: Annotated[float, Field(ge=0, le=256)] | None = None
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=16384)] | None = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] | None = 0
    resize_mode: Annotated[int, Field(ge=0, le=2)] | None = 0
    denoising_strength: Annotated[float, Field(ge=0, le=1)] | None = None
    include_init_images: bool | None = False
    image_cfg_scale: Annotated[float, Field(ge=0)] | None = None  # of instruct-pix2pix
    initial_noise_multiplier: Annotated[float, Field(ge=1, le=1)] | None = None
    enable_hr: No | None = None
    latent_mask: None = None
    mask_round: bool | None = None


# What is answered.


class Error(BaseModel):
    """error: one word; detail: one line."""

    detail: str
    error: str


class Images(BaseModel):
    """images: PNG files as base64; info: JSON text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class PngInfo(BaseModel):
    info: str
    items: dict[str, str]
    parameters: dict[str, str]


class PngInfoBody(BaseModel):
    """POST /sdapi/v1/png-info."""

    model_config = STRICT
    image: Base64


class InterruptBody(BaseModel):
    """POST /sdapi/v1/interrupt, skip: of one request; without it, of all."""

    model_config = STRICT
    force_task_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class State(BaseModel):
    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str
    job_count: int
    job_timestamp: str = '0'
    job_no: int
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    progress: float
    eta_relative: float
    state: State
    current_image: str | None = None
    textinfo: str


class Sampler(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str]


class Scheduler(BaseModel):
    name: str
    label: str
    aliases: list[str] | None
    default_rho: float | None
    need_inner_model: bool


class SDModel(BaseModel):
    model_config = {'protected_namespaces': ()}

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class Options(BaseModel):
    sd_model_checkpoint: str
    sd_checkpoint_hash: str
    sd_vae: str
    CLIP_stop_at_last_layers: int
    eta_noise_seed_delta: int = 0
    samples_format: str = 'png'


class OptionsBody(BaseModel):
    """POST /sdapi/v1/options: for all requests from then on; null leaves it as it is."""

    model_config = STRICT
    sd_model_checkpoint: Annotated[str, Field(max_length=512)] | None = None
    sd_checkpoint_hash: Annotated[str, Field(max_length=64)] | None = None
    sd_vae: Name | None = None
    CLIP_stop_at_last_layers: Annotated[int, Field(ge=1, le=100)] | None = None
    eta_noise_seed_delta: Annotated[int, Field(ge=0, le=0)] | None = None
    samples_format: Literal['png'] | None = None


class Health(BaseModel):
    status: str


