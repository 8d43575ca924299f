"""Files: written atomically, sealed, hashed; safetensors tensor by tensor."""
