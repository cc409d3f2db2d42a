// Go's net/http with pgx and redigo: cache-aside, the key is deleted after COMMIT. GOMAXPROCS sets the number of threads
// that run Go.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log"
	"net/http"
	"net/mail"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/gomodule/redigo/redis"
	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"
)

// pgx prepares each statement once on each connection.
const (
	selectUser = "SELECT id, name, email, created_at, updated_at, version FROM users WHERE id = $1"
	updateUser = "UPDATE users SET name = coalesce($1, name), email = coalesce($2, email) WHERE id = $3 RETURNING id"
)

const (
	poolSize       = 16 // as the two workers of the other apps together: bench/peers/user.py
	maxIdleToRedis = 128
	maxNameLength  = 100
	maxBodyBytes   = 64 << 10
)

type timestamp struct{ time.Time }

func (t timestamp) MarshalJSON() ([]byte, error) {
	return []byte(t.UTC().Format(`"2006-01-02T15:04:05.999999-07:00"`)), nil
}

type user struct {
	ID        int64     `json:"id"`
	Name      string    `json:"name"`
	Email     string    `json:"email"`
	CreatedAt timestamp `json:"created_at"`
	UpdatedAt timestamp `json:"updated_at"`
	Version   int64     `json:"version"`
}

type changes struct {
	Name  *string `json:"name"`
	Email *string `json:"email"`
}

// valid strips the name, and reports whether the changes keep the rules of a user.
func (c *changes) valid() bool {
	if c.Name != nil {
		*c.Name = strings.TrimSpace(*c.Name)
		if length := utf8.RuneCountInString(*c.Name); length < 1 || length > maxNameLength {
			return false
		}
	}
	if c.Email != nil {
		if address, err := mail.ParseAddress(*c.Email); err != nil || address.Address != *c.Email {
			return false
		}
	}
	return true
}

type service struct {
	database *pgxpool.Pool
	cache    *redis.Pool
	ttl      int
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, err := strconv.ParseInt(strings.TrimPrefix(r.URL.Path, "/users/"), 10, 64)
	if err != nil || id < 1 {
		http.NotFound(w, r)
		return
	}
	var body []byte
	switch r.Method {
	case http.MethodGet:
		body, err = s.get(r.Context(), id)
	case http.MethodPut:
		var wanted changes
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBodyBytes))
		decoder.DisallowUnknownFields()
		if decoder.Decode(&wanted) != nil || !wanted.valid() {
			http.Error(w, "the body is not valid", http.StatusUnprocessableEntity)
			return
		}
		body, err = s.put(r.Context(), id, wanted)
	default:
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		http.NotFound(w, r)
	case err != nil:
		log.Print(err)
		http.Error(w, "internal error", http.StatusInternalServerError)
	default:
		w.Header().Set("Content-Type", "application/json")
		w.Write(body)
	}
}

func (s *service) get(ctx context.Context, id int64) ([]byte, error) {
	key := "user:" + strconv.FormatInt(id, 10)
	cache := s.cache.Get()
	defer cache.Close()
	body, err := redis.Bytes(cache.Do("GET", key))
	if err != redis.ErrNil {
		return body, err
	}
	var it user
	row := s.database.QueryRow(ctx, selectUser, id)
	if err := row.Scan(&it.ID, &it.Name, &it.Email, &it.CreatedAt.Time, &it.UpdatedAt.Time, &it.Version); err != nil {
		return nil, err
	}
	var encoded bytes.Buffer
	encoder := json.NewEncoder(&encoded)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(it); err != nil {
		return nil, err
	}
	body = bytes.TrimSuffix(encoded.Bytes(), []byte("\n"))
	_, err = cache.Do("SETEX", key, s.ttl, body)
	return body, err
}

func (s *service) put(ctx context.Context, id int64, wanted changes) ([]byte, error) {
	if err := s.database.QueryRow(ctx, updateUser, wanted.Name, wanted.Email, id).Scan(&id); err != nil {
		return nil, err
	}
	cache := s.cache.Get()
	defer cache.Close()
	_, err := cache.Do("DEL", "user:"+strconv.FormatInt(id, 10))
	return []byte(`{"message":"Updated"}`), err
}

func number(name string) int {
	value, err := strconv.Atoi(os.Getenv(name))
	if err != nil {
		log.Fatalf("%s: %v", name, err)
	}
	return value
}

func main() {
	config, err := pgxpool.ParseConfig(os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	config.MaxConns = poolSize
	database, err := pgxpool.ConnectConfig(context.Background(), config)
	if err != nil {
		log.Fatal(err)
	}
	options := []redis.DialOption{
		redis.DialPassword(os.Getenv("REDIS_PASSWORD")),
		redis.DialDatabase(number("REDIS_DATABASE")),
	}
	cache := &redis.Pool{
		MaxIdle: maxIdleToRedis,
		Dial:    func() (redis.Conn, error) { return redis.Dial("unix", os.Getenv("REDIS_SOCKET"), options...) },
	}
	routes := http.NewServeMux()
	routes.Handle("/users/", &service{database, cache, number("REDIS_TTL")})
	server := &http.Server{Addr: os.Getenv("LISTEN"), Handler: routes, IdleTimeout: 75 * time.Second}
	log.Fatal(server.ListenAndServe())
}
