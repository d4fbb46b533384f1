"""Activations written once, on disk or on S3: a manifest and safetensors shards, written and read."""
