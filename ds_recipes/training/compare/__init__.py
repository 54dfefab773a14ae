"""Both engines on the same model, data and start, side by side: the only part of training that tells them apart."""
