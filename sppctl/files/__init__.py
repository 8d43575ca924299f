"""Files: atomic writes, sealed records, hashes, and safetensors read and written tensor by tensor."""
