"""Audits: do cut networks still decide for the reasons of the first of them?"""
