"""One Delta Lake transaction makes a dataset version: all of its shards and facts, or nothing."""

import json
import random
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from scalecv import storage
from scalecv.errors import DataError, StorageDenied, StorageError
from scalecv.shards import manifest as manifests
from scalecv.shards.manifest import Manifest, Shard
from scalecv.shards.store import LOG, commit_facts, put_facts
from scalecv.shards.unit import overtaken
from scalecv.shards.write import arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa


def commit(uri: str, manifest: Manifest, new: Sequence[Shard], after: int | None, plan: dict[str, str]) -> int:
    """Make `manifest` the newest version; its number.

    Args:
        uri: the dataset.
        manifest: all facts, of shards that are all written.
        new: the shards that the version before does not hold.
        after: the version that this one follows; None makes the table.
        plan: further facts for the commit's metadata, such as what was ingested.

    Raises: DataError: someone else committed meanwhile; nothing was changed. StorageDenied, StorageError: the store
        refuses, or does not answer.
    """
    from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
    from deltalake.transaction import AddAction, create_table_with_add_actions

    path, sha256 = put_facts(uri, manifests.encode(manifest), "json")
    facts = {"manifest": path, "manifest_sha256": sha256, "fingerprint": manifest.fingerprint, **plan}
    facts["commit"] = uuid.uuid4().hex
    schema = Schema.from_arrow(_table_schema(manifest.meta))
    adds = [
        AddAction(s.path, s.size_bytes, {"split": s.split}, 0, True, json.dumps({"numRecords": s.rows})) for s in new
    ]
    properties = CommitProperties({f"scalecv.{k}": v for k, v in facts.items()}, max_commit_retries=0)
    hooks = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
    options = storage.delta_options(uri)

    def transact() -> None:
        if after is None:
            create_table_with_add_actions(
                uri,
                schema,
                adds,
                mode="error",
                partition_by=["split"],
                configuration={"delta.enableExpiredLogCleanup": "false"},
                storage_options=options,
                commit_properties=properties,
                post_commithook_properties=hooks,
            )
            return
        table = DeltaTable(uri, storage_options=options)
        if table.version() != after:
            raise overtaken(uri)
        table.create_write_transaction(
            [*adds],
            mode="append",
            schema=schema,
            partition_by=["split"],
            commit_properties=properties,
            post_commithook_properties=hooks,
        )

    version = 0 if after is None else after + 1
    _persist(uri, transact, lambda: _is_there(uri, version, facts["commit"]))
    return version


def _persist(uri: str, transact: Callable[[], None], is_done: Callable[[], bool]) -> None:
    """Try a transaction until it is done: `deltalake` gives up over an answer that breaks off, or that is lost."""
    from deltalake.exceptions import CommitFailedError, DeltaError

    from scalecv.storage_remote import give_up_after_s

    where, since = storage.without_secrets(uri), None
    while True:
        try:
            transact()
            return
        except (DataError, DeltaError, OSError) as error:
            if is_done():
                return
            said = str(error)
            if isinstance(error, CommitFailedError) or "already exist" in said or "conflict" in said.lower():
                raise overtaken(uri) from None
            if isinstance(error, DataError):
                raise
            if storage.is_local(uri) or any(f"status code: {code}" in said for code in (401, 403)):
                kind = StorageDenied if isinstance(error, OSError) else StorageError
                raise kind(f"{where}: the commit was refused: {said}") from None
            since = since or time.monotonic()
            if time.monotonic() - since > give_up_after_s():
                first = said.strip().splitlines()[0] if said.strip() else type(error).__name__
                raise StorageError(
                    f"{where}: the commit got no good answer for {give_up_after_s():.0f} s: {first}; "
                    "nothing was changed, the same command goes on"
                ) from None
        time.sleep(0.2 + random.random())  # noqa: S311 - jitter


def _is_there(uri: str, version: int, nonce: str) -> bool:
    """Whether a version is the one that we tried to write: its answer may have been lost."""
    if not storage.exists(storage.join(uri, LOG, f"{version:020d}.json")):
        return False
    return commit_facts(uri, version).get("commit") == nonce


def _table_schema(meta: Sequence[str]) -> "pa.Schema":
    import pyarrow as pa

    return arrow_schema(meta).append(pa.field("split", pa.string()))
