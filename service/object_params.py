"""The parameters `source` and `target`: a request's input and output in object stores."""

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, Query, Request

from models.errors import ParameterError
from models.image import OutputFormat
from service import object_writes, sources, uploads
from service.auth import Caller
from service.deps import DecodeCaller, EncodeCaller, ServicesDep
from service.object_writes import PictureTarget
from service.services import Services
from worker.queue.references import Reference

SourceQuery = Annotated[
    str | None,
    Query(
        description="An object `store:NAME/KEY` of a configured store, to read in place of a body.",
        examples=["store:incoming/a.msh"],
    ),
]
TargetQuery = Annotated[
    str | None,
    Query(
        description="An object `store:NAME/KEY` of a configured store, to write the output to. The "
        "response is then a JSON document.",
        examples=["store:outgoing/a.webp"],
    ),
]


async def decode_input(
    request: Request, services: ServicesDep, caller: DecodeCaller, source: SourceQuery = None
) -> AsyncGenerator[bytes, None]:
    """The bitstream: the body or, with `source`, an object, whose header is checked first.

    Its memory counts against the upload budget until the response is sent. Raises as `uploads.read`
    and `sources.read`.
    """
    with services.uploads.upload() as reserve:
        if source is None:
            yield await uploads.read(request, services.settings, reserve)
        else:
            yield await sources.read(
                request, services, caller, source, reserve, sources.check_header
            )


async def encode_input(
    request: Request, services: ServicesDep, caller: EncodeCaller, source: SourceQuery = None
) -> AsyncGenerator[bytes, None]:
    """The picture file: the body or, with `source`, an object. Otherwise as `decode_input`."""
    with services.uploads.upload() as reserve:
        if source is None:
            yield await uploads.read(request, services.settings, reserve)
        else:
            yield await sources.read(request, services, caller, source, reserve)


async def picture_target(
    services: ServicesDep,
    caller: DecodeCaller,
    target: TargetQuery = None,
    format: Annotated[
        OutputFormat | None,
        Query(description="Format of the target; default: the one that its suffix names."),
    ] = None,
) -> PictureTarget | None:
    """The target of a decode, with its format; None without one.

    Raises `ParameterError`, `StoreNotFound`, `StoreForbidden`.
    """
    if target is None:
        if format is not None:
            raise ParameterError("format: only with target; other responses follow Accept")
        return None
    reference = _writable(services, caller, target)
    return PictureTarget(reference, format or object_writes.format_of(reference))


async def bitstream_target(
    services: ServicesDep, caller: EncodeCaller, target: TargetQuery = None
) -> Reference | None:
    """The target of an encode; None without one. Raises as `picture_target`."""
    return None if target is None else _writable(services, caller, target)


DecodeInput = Annotated[bytes, Depends(decode_input)]
EncodeInput = Annotated[bytes, Depends(encode_input)]
PictureTargetDep = Annotated[PictureTarget | None, Depends(picture_target)]
BitstreamTargetDep = Annotated[Reference | None, Depends(bitstream_target)]


def _writable(services: Services, caller: Caller, text: str) -> Reference:
    reference = Reference.parse(text, "target")
    services.objects.check(reference, caller.name, "write")
    return reference
