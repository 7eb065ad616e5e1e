"""The feature store: token features on disk, in plain Arrow files with a manifest."""

from cenote.features.store.listing import Listing, changes, read_listing, write_listing
from cenote.features.store.manifest import Dtype, Manifest, ShardEntry, is_store, read_manifest
from cenote.features.store.pictures import StoredPictures
from cenote.features.store.shards import Rows, ShardFile, finished_shards, write_shard
from cenote.features.store.source import StoredLayers
from cenote.features.store.tokens import StoredTokens

__all__ = [
    "Dtype",
    "Listing",
    "Manifest",
    "Rows",
    "ShardEntry",
    "ShardFile",
    "StoredLayers",
    "StoredPictures",
    "StoredTokens",
    "changes",
    "finished_shards",
    "is_store",
    "read_listing",
    "read_manifest",
    "write_listing",
    "write_shard",
]
