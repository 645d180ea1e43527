"""One Delta Lake transaction makes a dataset version: all of its shards and facts, or nothing."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scalecv import storage
from scalecv.errors import StorageDenied, StorageError
from scalecv.shards import manifest as manifests
from scalecv.shards.manifest import Manifest, Shard
from scalecv.shards.store import FACTS
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

    Raises: DataError: someone else committed meanwhile; nothing was changed.
    """
    from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
    from deltalake.exceptions import CommitFailedError, DeltaError
    from deltalake.transaction import AddAction, create_table_with_add_actions

    data = manifests.encode(manifest)
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"{FACTS}/{sha256}.json"
    storage.put(storage.join(uri, path), data)
    facts = {"manifest": path, "manifest_sha256": sha256, "fingerprint": manifest.fingerprint, **plan}
    schema = Schema.from_arrow(_table_schema(manifest.meta))
    adds = [
        AddAction(s.path, s.size_bytes, {"split": s.split}, 0, True, json.dumps({"numRecords": s.rows})) for s in new
    ]
    properties = CommitProperties({f"scalecv.{k}": v for k, v in facts.items()}, max_commit_retries=0)
    hooks = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
    options = storage.delta_options(uri)
    try:
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
        else:
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
    except CommitFailedError:
        raise overtaken(uri) from None
    except DeltaError as error:
        if "already exist" in str(error) or "conflict" in str(error).lower():
            raise overtaken(uri) from None
        raise StorageError(f"{storage.without_secrets(uri)}: the commit failed: {error}") from None
    except OSError as error:
        raise StorageDenied(f"{storage.without_secrets(uri)}: the commit was refused: {error}") from None
    return 0 if after is None else after + 1


def _table_schema(meta: Sequence[str]) -> "pa.Schema":
    import pyarrow as pa

    return arrow_schema(meta).append(pa.field("split", pa.string()))
