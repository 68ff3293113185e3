"""Prints fanlight/contract/annotators.json from the registry of annotators: `make catalog`."""

import sys

from fanlight.contract.shipped import ShippedAnnotator, written
from services.preprocessor.annotator import Annotator, pinned
from services.preprocessor.registry import CORE, NEURAL, aliases_of


def shipped(annotator: Annotator) -> ShippedAnnotator:
    return ShippedAnnotator(
        id=annotator.id,
        # Without the libraries' versions, which differ from machine to machine.
        version="+".join((str(annotator.revision), *pinned(annotator.models))),
        description=annotator.description,
        parameters=annotator.all_parameters,
        deterministic=annotator.deterministic,
        weight_bytes=annotator.weight_bytes,
        controlnets=annotator.controlnets,
        aliases=tuple(aliases_of(annotator.id)),
        license=annotator.license,
    )


if __name__ == "__main__":
    sys.stdout.write(written([shipped(each) for each in (*CORE, *NEURAL)]))
