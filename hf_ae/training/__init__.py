"""Parts of a training, which the scripts `hf_ae.train*` put together."""
