"""dInfer as an engine: probed before it is believed."""
