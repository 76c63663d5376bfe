"""The strategies by name. One more is a file with its engine and a line here. Imports nothing."""

# name -> "module:class"; resolved late, so that ddp and fsdp start where DeepSpeed cannot be imported
STRATEGIES = {
    "ddp": "pipeline.parallel.replicated:ReplicatedEngine",
    "fsdp": "pipeline.parallel.sharded:ShardedEngine",
    "hsdp": "pipeline.parallel.sharded:ShardedEngine",
    "zero1": "pipeline.parallel.zero:ZeroEngine",
    "zero2": "pipeline.parallel.zero:ZeroEngine",
    "zero3": "pipeline.parallel.zero3:Zero3Engine",
}
