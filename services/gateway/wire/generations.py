"""A generation request: checked, names resolved, one task for each control image and each image."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fanlight.contract import generation, masks, schedulers
from fanlight.contract.filled import missing
from fanlight.contract.images import image_at
from fanlight.contract.limits import EMBEDDINGS_LIMIT, check_size, size_step_px
from fanlight.contract.masks import Size
from fanlight.contract.names import is_reference
from fanlight.contract.needs import SAFETY_CHECKER, Needs, needs_of
from fanlight.contract.prompt import loras_in, with_loras_renamed, words_in
from fanlight.contract.warnings import bounded_warnings
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, InvalidField, NotFound
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.submission import KeptImage, SourceImage
from services.gateway.domain.job import DIFFUSION, ControlImage, Facts, Input, StageRequest
from services.gateway.domain.moderation import Policy, stricter
from services.gateway.domain.plan import JobPlan, NewTask
from services.gateway.domain.workers import (
    CHECKPOINT,
    CONTROLNET,
    EMBEDDING,
    LORA,
    VAE,
    AnnouncedAnnotator,
    AnnouncedModel,
)
from services.gateway.wire import annotations
from services.gateway.wire.images import put_blob, source_images
from services.gateway.wire.needs import (
    Fleet,
    amounts_of,
    checkpoint_of,
    controlnet_of,
    facts_of,
    model_of,
    names_of,
    newer_fields,
    require,
    require_stage,
    within,
)

FIELD = "generation"
# The annotators' parameter for what is done with a photo of another aspect ratio, and what is done if nothing is said.
RESIZE_MODE, CROP = "resize_mode", generation.RESIZES[0]
# For a size that an image implies, where the checkpoint is not known yet: whole latents of every family.
UNKNOWN_SIZE_STEP_PX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Annotation:
    """How a control's image is made from its photo, which is not in the request yet."""

    control: int
    request: preprocessor_pb2.AnnotateRequest
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDraft:
    # With all that depends on the fleet filled in.
    request: diffusion_pb2.GenerateRequest
    facts: Facts
    annotations: Sequence[_Annotation]
    images: Sequence[SourceImage]
    needs: Needs
    # Of the size that an image implies.
    size_step_px: int
    fleet: Fleet
    warnings: tuple[str, ...] = ()

    @property
    def tasks_limit(self) -> int:
        return len(self.annotations) + generation.count_of(self.request)

    def under(self, policy: Policy) -> "GenerationDraft":
        """With the stricter of what the request and the policy make of unsafe images, and a need for it."""
        asked = self.request.safety_checker
        strict = stricter(Policy(asked or Policy.OFF), policy)
        if strict is Policy(asked or Policy.OFF):
            return self
        request, need = _copy(self.request), f"{SAFETY_CHECKER}:{strict}"
        request.safety_checker = strict
        others = [each for each in self.needs.offers if each[1] != SAFETY_CHECKER]
        needs = Needs(offers=(*others, (need, SAFETY_CHECKER)), amounts=self.needs.amounts)
        with within(FIELD):
            require(self.fleet, DIFFUSION, needs)
        told = f"safety_checker: is {asked}; the operator's policy makes it {strict}"
        return replace(
            self,
            request=request,
            needs=needs,
            facts=replace(self.facts, needs=names_of(needs)),
            warnings=bounded_warnings([*self.warnings, told]) if asked else self.warnings,
        )

    def plan(self, kept: Mapping[str, KeptImage], draw: Callable[[], int]) -> JobPlan:
        """Annotations first, each distinct one once; then one task per image.

        InvalidField for a mask of another aspect ratio than the image; TooLarge for too large a result of the image's
        size; FailedPrecondition, field `width_px`, where no worker takes the size that the image implies.
        """
        _check_mask(kept)
        return self._sized(kept)._plan(kept, draw)

    def _sized(self, kept: Mapping[str, KeptImage]) -> "GenerationDraft":
        """With the sizes that the image to start from implies: of what is generated, the result, and control images."""
        image = kept.get(f"{FIELD}.image")
        if image is None:
            return self
        size, sides = (image.size.width_px, image.size.height_px), masks.sides_of(self.request)
        request, needs = self.request, self.needs
        with within(FIELD):
            if not request.width_px and not request.only_masked:
                request = _copy(request)
                request.width_px, request.height_px = masks.size_of_outpainted(size, sides, self.size_step_px)
                needs = Needs(offers=self.needs.offers, amounts=needs_of(request).amounts)
                require(self.fleet, DIFFUSION, needs)
            facts = replace(
                self.facts, amounts=amounts_of(needs), width_px=request.width_px, height_px=request.height_px
            )
            if request.only_masked:
                facts = replace(facts, result_size_px=masks.check_pasted(size, sides))
            annotated = [self._fitted(each, request, size) for each in self.annotations]
        return replace(self, request=request, facts=facts, annotations=annotated, needs=needs)

    def _fitted(self, annotation: _Annotation, request: diffusion_pb2.GenerateRequest, size: Size) -> _Annotation:
        """At the size at which its control image lies on the image, which has the size given."""
        asked = request.width_px, request.height_px
        fitted_px = masks.size_of_control_image(
            size, asked, masks.sides_of(request), only_masked=request.only_masked, resize=request.resize
        )
        if not all(asked) or fitted_px == (annotation.request.width_px, annotation.request.height_px):
            return annotation
        return _resized(annotation, *fitted_px, self.fleet)

    def _plan(self, kept: Mapping[str, KeptImage], draw: Callable[[], int]) -> JobPlan:
        asked = _copy(self.request)
        for field, image in kept.items():
            put_blob(image_at(asked, field.removeprefix(f"{FIELD}.")), image.blob)
        # Control images are made at the size of what they condition: thin lines do not survive being scaled later.
        made = {
            each.control: annotations.stage_request(each.request, asked.controls[each.control].image, each.facts)
            for each in self.annotations
        }
        makers = tuple(dict.fromkeys(made.values()))
        numbers = {control: makers.index(maker) + 1 for control, maker in made.items()}
        inputs = tuple(Input(field=_image_of(control), task=number) for control, number in numbers.items())
        requests = [_stage_request(asked, self.facts), *makers]
        if inputs:
            requests.append(_stage_request(_with_made_images(asked, numbers), self.facts))
        work = len(requests) - 1 if inputs else 0
        images = [
            NewTask(request=work, patch=patch.SerializeToString(deterministic=True), inputs=inputs)
            for patch in generation.split(asked, draw)
        ]
        return JobPlan(
            requests=tuple(requests),
            tasks=(*(NewTask(request=index) for index in range(1, len(makers) + 1)), *images),
            control_images=tuple(_control_images(asked, numbers, kept)),
            blobs=tuple(dict.fromkeys(image.blob for image in kept.values())),
            warnings=self.warnings,
        )


def draft(message: diffusion_pb2.GenerateRequest, fleet: Fleet) -> GenerationDraft:
    """InvalidField, NotFound, TooLarge and FailedPrecondition name the field; Unavailable without any worker."""
    with within(FIELD), _naming_default(message, fleet):
        generation.check(message)
        request = _resolved(message, fleet)
        by_control = _annotators(request, fleet)
        _resolve_controlnets(request, by_control, fleet)
        generation.check_resolved(request)
        newer = newer_fields(message)
        for word in _words(request, newer, fleet):
            request.embeddings.append(word)
        needs = _joined(needs_of(request), newer)
        require(fleet, DIFFUSION, needs)
        annotated = [_annotation(request, index, annotator, fleet) for index, annotator in by_control.items()]
    return GenerationDraft(
        request=request,
        facts=_facts(request, needs, fleet),
        annotations=annotated,
        images=source_images(message, FIELD),
        needs=needs,
        size_step_px=_model(request, fleet).size_step_px or UNKNOWN_SIZE_STEP_PX,
        fleet=fleet,
        warnings=generation.warnings_of(message),
    )


@contextmanager
def _naming_default(message: diffusion_pb2.GenerateRequest, fleet: Fleet) -> Iterator[None]:
    """Errors about a checkpoint that the request does not name say where it comes from."""
    try:
        yield
    except (InvalidField, NotFound, FailedPrecondition) as error:
        model = None if message.model else fleet.catalog().default_checkpoint()
        if model is None or model.id not in error.message:
            raise
        text = f"{error.message}; the request names no model, and {model.id} is the default"
        raise type(error)(text, field=error.field) from error


def _check_mask(kept: Mapping[str, KeptImage]) -> None:
    """InvalidField unless the mask has the image's aspect ratio. A quarter turn is left to the worker."""
    image, mask = kept.get(f"{FIELD}.image"), kept.get(f"{FIELD}.mask")
    if image is None or mask is None:
        return
    sizes = [(each.size.width_px, each.size.height_px) for each in (mask, image)]
    if not masks.is_alike(sizes[0], sizes[1]) and not masks.is_alike(sizes[0][::-1], sizes[1]):
        raise masks.refuse_mask(*sizes).within(FIELD)


def _copy(message: diffusion_pb2.GenerateRequest) -> diffusion_pb2.GenerateRequest:
    copy = diffusion_pb2.GenerateRequest()
    copy.CopyFrom(message)
    return copy


def _joined(first: Needs, second: Needs) -> Needs:
    return Needs(offers=(*first.offers, *second.offers), amounts=(*first.amounts, *second.amounts))


def _model(request: diffusion_pb2.GenerateRequest, fleet: Fleet) -> AnnouncedModel:
    return checkpoint_of(fleet.catalog(), request.model, field="model")


def _resolved(message: diffusion_pb2.GenerateRequest, fleet: Fleet) -> diffusion_pb2.GenerateRequest:
    """With models by their ids, the scheduler by its short name, pipeline, size and the model's defaults filled in."""
    catalog = fleet.catalog()
    require_stage(catalog, DIFFUSION)
    request = _copy(message)
    model = _model(request, fleet)
    request.model = model.id
    request.pipeline = _pipeline(request, model)
    _resolve_size(request, model)
    request.MergeFrom(missing(request, model.defaults))
    if request.scheduler or request.noise_schedule:
        request.scheduler, request.noise_schedule = schedulers.resolve(request.scheduler, request.noise_schedule)
    syntax = generation.syntax_of(request)
    if loras_in(request.prompt, syntax):
        request.prompt = with_loras_renamed(
            request.prompt, lambda name: model_of(catalog, LORA, name, model, field="prompt"), syntax
        )
    for i, use in enumerate(request.loras):
        use.model = model_of(catalog, LORA, use.model, model, field=f"loras[{i}].model")
    if request.vae:
        request.vae = model_of(catalog, VAE, request.vae, model, field="vae")
    request.embeddings[:] = [
        model_of(catalog, EMBEDDING, name, model, field=f"embeddings[{i}]") for i, name in enumerate(request.embeddings)
    ]
    return request


def _pipeline(request: diffusion_pb2.GenerateRequest, model: AnnouncedModel) -> str:
    pipeline = generation.pipeline_of(request)
    if model.pipelines and pipeline not in model.pipelines:
        known = ", ".join(model.pipelines)
        raise NotFound(f"{model.id} has no pipeline {pipeline}; it has {known}", field="pipeline")
    return pipeline


def _resolve_size(request: diffusion_pb2.GenerateRequest, model: AnnouncedModel) -> None:
    """The model's own size if no size is requested; unset if the model does not say, or if an image decides it."""
    if not request.width_px and not request.height_px and (not request.HasField("image") or request.only_masked):
        own = model.defaults if model.defaults.width_px and model.defaults.height_px else model
        request.width_px, request.height_px = own.width_px, own.height_px
    check_size(request.width_px, request.height_px, size_step_px(model.size_step_px))


def _annotators(request: diffusion_pb2.GenerateRequest, fleet: Fleet) -> dict[int, AnnouncedAnnotator]:
    """By index of the control, for controls that have one."""
    return {
        index: annotations.annotator_for(control.annotator, fleet, field=f"controls[{index}].annotator")
        for index, control in enumerate(request.controls)
        if control.annotator
    }


def _resolve_controlnets(
    request: diffusion_pb2.GenerateRequest, annotators: Mapping[int, AnnouncedAnnotator], fleet: Fleet
) -> None:
    catalog, model = fleet.catalog(), _model(request, fleet)
    for index, control in enumerate(request.controls):
        field = f"controls[{index}].controlnet"
        control.controlnet = controlnet_of(catalog, control.controlnet, annotators.get(index), model, field=field)


def _words(request: diffusion_pb2.GenerateRequest, newer: Needs, fleet: Fleet) -> Sequence[str]:
    """Embeddings that the prompts name but the request does not list, if one worker has them with all other needs.

    Only live workers count, if any can do the request. Other names stay plain words: a word in a prompt never makes an
    image wait for a worker that is away. InvalidField for too many.
    """
    text, family = f"{request.prompt}\n{request.negative_prompt}", _model(request, fleet).family
    named = words_in(text, fleet.catalog().mentioned(EMBEDDING, text, family))
    words = [each for each in named if each not in request.embeddings]
    if len(request.embeddings) + len(words) > EMBEDDINGS_LIMIT:
        raise InvalidField(
            f"names {len(words)} embeddings, {len(request.embeddings) + len(words)} with those listed;"
            f" at most {EMBEDDINGS_LIMIT}",
            field="prompt",
        )
    if not words:
        return []
    needs = _joined(needs_of(request), newer)
    names, amounts = names_of(needs), amounts_of(needs)
    only_live = fleet.can_any(DIFFUSION, names, amounts, only_live=True)
    found = []
    for word in words:
        more = names | {f"{EMBEDDING}:{word}"}
        if fleet.can_any(DIFFUSION, more, amounts, only_live=only_live):
            names = more
            found.append(word)
    return found


def _annotation(
    request: diffusion_pb2.GenerateRequest, index: int, annotator: AnnouncedAnnotator, fleet: Fleet
) -> _Annotation:
    """Also fills in the control's parameters."""
    control = request.controls[index]
    message = preprocessor_pb2.AnnotateRequest(
        annotator=annotator.id,
        parameters=control.parameters,
        width_px=request.width_px,
        height_px=request.height_px,
    )
    _fit_alike(message, control.resize or request.resize, annotator)
    with within(f"controls[{index}]"):
        resolved = annotations.resolved(message, annotator)
    facts = annotations.facts_for(resolved, fleet, field=f"controls[{index}].annotator")
    control.annotator = annotator.id
    control.parameters.CopyFrom(resolved.parameters)
    return _Annotation(control=index, request=resolved, facts=facts)


def _fit_alike(message: preprocessor_pb2.AnnotateRequest, resize: str, annotator: AnnouncedAnnotator) -> None:
    """Have a photo of another aspect ratio fitted as the image to start from is, unless its parameters say how."""
    takes = any(each.name == RESIZE_MODE and (resize or CROP) in each.choices for each in annotator.parameters)
    if takes and RESIZE_MODE not in message.parameters.fields:
        message.parameters[RESIZE_MODE] = resize or CROP


def _resized(annotation: _Annotation, width_px: int, height_px: int, fleet: Fleet) -> _Annotation:
    request = preprocessor_pb2.AnnotateRequest()
    request.CopyFrom(annotation.request)
    request.width_px, request.height_px = width_px, height_px
    facts = annotations.facts_for(request, fleet, field=f"controls[{annotation.control}].annotator")
    return replace(annotation, request=request, facts=facts)


def _facts(request: diffusion_pb2.GenerateRequest, needs: Needs, fleet: Fleet) -> Facts:
    loras = generation.lora_weights(request)
    named = [
        (CHECKPOINT, request.model),
        (VAE, request.vae),
        *((EMBEDDING, each) for each in request.embeddings),
        *((CONTROLNET, each.controlnet) for each in request.controls),
        *((LORA, each) for each in loras),
    ]
    return facts_of(
        needs,
        checkpoint=request.model,
        family=_model(request, fleet).family,
        models=frozenset(name for _, name in named if name),
        references=frozenset(f"{kind}:{name}" for kind, name in named if is_reference(name)),
        loras=tuple(sorted((name, unet) for name, (unet, _) in loras.items())),
        width_px=request.width_px,
        height_px=request.height_px,
        steps=_evaluations(request),
        guided=generation.is_guided(request),
    )


def _evaluations(request: diffusion_pb2.GenerateRequest) -> int:
    """The steps; with AND as many steps without it as have so many noise predictions."""
    steps, guided = generation.steps_of(request), generation.is_guided(request)
    return math.ceil(steps * generation.predictions_of(request) / (1 + guided))


def _stage_request(request: diffusion_pb2.GenerateRequest, facts: Facts) -> StageRequest:
    message = request.SerializeToString(deterministic=True)
    return StageRequest(stage=DIFFUSION, field=FIELD, message=message, facts=facts)


def _image_of(control: int) -> str:
    return f"controls[{control}].image"


def _with_made_images(
    asked: diffusion_pb2.GenerateRequest, numbers: Mapping[int, int]
) -> diffusion_pb2.GenerateRequest:
    """What a diffusion worker gets: control images instead of photos, and how they were made."""
    request = _copy(asked)
    for index in numbers:
        control = request.controls[index]
        control.made_by.annotator = control.annotator
        control.made_by.parameters.CopyFrom(control.parameters)
        for name in ("annotator", "parameters", "image"):
            control.ClearField(name)
    return request


def _control_images(
    asked: diffusion_pb2.GenerateRequest, numbers: Mapping[int, int], kept: Mapping[str, KeptImage]
) -> Sequence[ControlImage]:
    """In the controls' order; without controls whose image the diffusion worker makes itself."""
    images = []
    for index, control in enumerate(asked.controls):
        image = kept.get(f"{FIELD}.{_image_of(index)}")
        if index in numbers:
            images.append(ControlImage(annotator=control.annotator, task=numbers[index]))
        elif image is not None:
            images.append(ControlImage(annotator=control.made_by.annotator, blob=image.blob))
    return images
