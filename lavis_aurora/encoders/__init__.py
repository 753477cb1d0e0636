"""LAVIS's towers as this package runs them: fused attention, gates, packed texts, images that several texts share."""
