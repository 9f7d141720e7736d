-- Sends the requests of one row of the table with wrk. Prints requests per second, median and 99th percentile in
-- microseconds, responses with an error status, all responses, and requests without a response.

local body = '{"name": "Loft", "postal_address": {"street_address": "1 rue Oberkampf", "postal_code": "75011", "city": "Paris", '
    .. '"country": "FR"}, "description": "' .. string.rep("Nice. ", 40) .. '", "building_type": "HOUSE", '
    .. '"latest_price_eur": =price=, "surface_area_m2": 42.5, "rooms_count": 2, "bedrooms_count": 1, '
    .. '"contact_phone_number": "+33123456789"}'
-- The API key, if the environment has one.
local key = os.getenv("KEY")
local headers = { ["Content-Type"] = "application/json", ["Authorization"] = key and "Bearer " .. key }

-- A number for the Idempotency-Key, unlike all others of this thread, of other threads and of other rounds.
local started, keys = os.time() % 1000000, 0
function new_key()
    keys = keys + 1
    return (started * 100 + number) * 10000000 + keys
end

local listings = tonumber(os.getenv("LISTINGS") or 500000)
local price = '{"latest_price_eur": =price=}'

-- The method, the path, a function that returns the numbers of one request (first for the path, then for the body), and the
-- body if it is another.
local rows = {
    history = { "GET", "/listings/%d/prices", function() return math.random(listings) end },
    listing = { "GET", "/listings/%d", function() return math.random(listings) end },
    hot = { "GET", "/listings/4711", function() end },
    unknown = { "GET", "/listings/%d", function() return 500000000 + math.random(500000) end },
    common = { "GET", "/listings?city=Paris&limit=100&after=%d", function() return math.random(400000) end },
    rare = { "GET", "/listings?city=Town%%20%d&limit=100", function() return math.random(600) end },
    keep = { "PUT", "/listings/%d", function() local id = math.random(400001, 500000) return id, 100000 + id end },
    reprice = { "PUT", "/listings/%d", function() return math.random(400001, 500000), math.random(1000000, 9000000) end },
    patch = { "PATCH", "/listings/%d", function() return math.random(listings), math.random(1000000, 9000000) end, price },
    create = { "POST", "/listings", function() return math.random(1000000) end },
    keyed = { "POST", "/listings", function() return new_key(), math.random(1000000) end },
}

local threads = 0
function setup(thread)
    thread:set("number", threads)
    threads = threads + 1
end

-- Builds each request once, without its numbers. Filling in the numbers costs 0.1 µs for a read and 0.4 µs for a write.
-- Building all requests in advance would skew the result: one thread would still build while the other is measured.
local request_with, numbers
function init(arguments)
    math.randomseed(os.time() * 100 + number)
    local method, path, other_body
    method, path, numbers, other_body = unpack(rows[arguments[1]])
    headers["Idempotency-Key"] = arguments[1] == "keyed" and "=key=" or nil
    request_with = method == "GET" and wrk.format(method, path) or wrk.format(method, path, headers, other_body or body)
    -- The placeholder is as long as the number, because wrk has already counted the length of the body.
    request_with = request_with:gsub("=key=", "%%d"):gsub("=price=", "%%7d")
end

function request()
    return request_with:format(numbers())
end

function done(summary, latency)
    local errors = summary.errors
    print(("result %d %d %d %d %d %d"):format(summary.requests / summary.duration * 1e6, latency:percentile(50),
        latency:percentile(99), errors.status, summary.requests,
        errors.connect + errors.read + errors.write + errors.timeout))
end
