"""Lists the sources of a batch below a prefix, a part at a time."""

import heapq
from collections.abc import Iterable, Iterator
from itertools import islice

from models.errors import ParameterError
from models.image import SUFFIXES
from worker.queue.batches.records import MAX_ITEMS, Batch, Item, Spec
from worker.queue.object_stores import ObjectStores
from worker.queue.references import Reference, StoreRefused, parse_prefix

KEYS = 5000
"""Keys that one step reads: a second for a local folder of 100,000 files, 5 requests to S3."""


def check(objects: ObjectStores, spec: Spec, caller: str) -> None:
    """Raise `StoreNotFound` or `StoreForbidden` unless the caller may use both prefixes."""
    objects.check(parse_prefix(spec.source, "source"), caller, "read")
    objects.check(parse_prefix(spec.target, "target"), caller, "write")


def read(objects: ObjectStores, batch: Batch) -> tuple[list[Item], str, bool]:
    """The items of the next `KEYS` keys.

    Also returns the last key, and whether it was the last of the listing. Raises `StoreError`, and
    `ParameterError` for more than `MAX_ITEMS` items.
    """
    spec = batch.spec
    check(objects, spec, batch.caller)
    source = parse_prefix(spec.source, "source")
    keys = objects.list(source, batch.after)
    if objects.configs[source.store].is_local:  # in no order
        part = heapq.nsmallest(KEYS, keys)
    else:
        part = list(islice(_ascending(source, keys), KEYS))
    items = list(_items(spec, source, part))
    if batch.total + len(items) > MAX_ITEMS:
        raise ParameterError(
            f"source: {spec.source} holds more than {MAX_ITEMS} objects; choose a longer prefix"
        )
    return items, part[-1] if part else batch.after, len(part) < KEYS


def _ascending(prefix: Reference, keys: Iterable[str]) -> Iterator[str]:
    """The keys. Raises `StoreRefused` for another order, as that of S3's directory buckets."""
    former = ""
    for key in keys:
        if key < former:
            raise StoreRefused(
                f"the object store {prefix.store!r} does not list its keys in ascending order; "
                "send the items of the batch one by one"
            )
        former = key
        yield key


def _items(spec: Spec, source: Reference, keys: Iterable[str]) -> Iterator[Item]:
    suffix = suffix_of(spec)
    for key in keys:
        name = key.removeprefix(source.key)
        if name.endswith(spec.suffix) and not f"/{name}".endswith(f"/{spec.suffix}"):
            target = f"{spec.target}{name.removesuffix(spec.suffix)}{suffix}"
            yield Item(f"store:{source.store}/{key}", target, spec.seed)


def suffix_of(spec: Spec) -> str:
    """The suffix of the targets."""
    return next(suffix for suffix, format in SUFFIXES.items() if format == (spec.format or "png"))
