"""Encoders as multi-scale backbones, for the detection and segmentation frameworks of others."""
