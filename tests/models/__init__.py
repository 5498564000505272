"""Tests of strop.models."""
