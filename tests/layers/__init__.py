"""Tests of strop.layers."""
