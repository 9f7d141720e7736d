//! All tests, in one program: they share one template database and run side by side, each on a database of its own.

mod capture;
mod commands;
mod guard;
mod harness;
mod migrations;
mod problems;
mod readme;
mod restore;
mod truth;
mod views;
