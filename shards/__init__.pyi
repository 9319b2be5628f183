from .build.build import build_shard as build_shard
from .build.plan import make_plan as make_plan
from .codecs import decode_sample as decode_sample
from .manifest import read_manifest as read_manifest
from .reading import open_shards as open_shards
