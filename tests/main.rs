//! All tests, in one program: they share one template database and run side by side, each on a database of its own.

mod capture;
mod chaos;
mod commands;
mod contract;
mod failover;
mod guard;
mod harness;
mod input;
mod keys;
mod load;
mod migrations;
mod outage;
mod owners;
mod problems;
mod readme;
mod restore;
mod rollout;
mod service;
mod start;
mod truth;
mod views;
